"""/tokenize and /detokenize: how a model reads text."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.admission import encode
from service.api.answer import bytes_of
from service.api.body import describe_body, read_body
from service.api.caller import identify
from service.api.documentation import errors
from service.api.errors import JsonResponse
from service.api.schemas import DetokenizeRequest, TextAnswer, TokenizeRequest, TokensAnswer
from service.api.state import state_of
from service.errors import InvalidValue

router = APIRouter(tags=["tokens"], dependencies=[Depends(identify)])
ERRORS = errors(400, 401, 404, 413, 422, 503)


@router.post(
    "/tokenize",
    summary="Text to token ids",
    responses={200: {"model": TokensAnswer}, **ERRORS},
    openapi_extra=describe_body(TokenizeRequest),
)
async def tokenize(request: Request, body: Annotated[TokenizeRequest, Depends(read_body(TokenizeRequest))]) -> Response:
    """Special tokens written out in the text become their ids."""
    model = await state_of(request).models.get(body.model)
    token_ids = await encode(model, body.text, "text") if body.text else []
    return JsonResponse(
        {
            "model": model.name,
            "token_ids": token_ids,
            "tokens": [bytes_of(token_id, model).decode("utf-8", "replace") for token_id in token_ids],
            "count": len(token_ids),
            "context_length": model.context_length,
        }
    )


@router.post(
    "/detokenize",
    summary="Token ids to text",
    responses={200: {"model": TextAnswer}, **ERRORS},
    openapi_extra=describe_body(DetokenizeRequest),
)
async def detokenize(
    request: Request, body: Annotated[DetokenizeRequest, Depends(read_body(DetokenizeRequest))]
) -> Response:
    """Bytes that are no character become U+FFFD."""
    model = await state_of(request).models.get(body.model)
    vocab_size = model.folder.config.vocab_size
    highest = max(body.token_ids, default=0)
    if highest >= vocab_size:
        raise InvalidValue(f"token_ids holds {highest}; {model.name} has {vocab_size:,} ids.", param="token_ids")
    text = model.tokenizer.decode(body.token_ids, skip_special_tokens=body.skip_special_tokens)
    return JsonResponse({"model": model.name, "text": text})
