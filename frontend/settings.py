"""Every setting of the page, and the only place that reads its environment."""

from __future__ import annotations

import functools

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One frozen object, read once at start."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, populate_by_name=True)

    api_url: str = Field(
        "http://127.0.0.1:8000",
        description="where the page's own process reaches the API; a browser never does",
        validation_alias="SMOLLM_API_URL",
    )
    api_key: SecretStr | None = Field(
        None,
        description="sent as `Authorization: Bearer` where the API asks for a key",
        validation_alias="SMOLLM_API_KEY",
    )
    host: str = Field("127.0.0.1", description="address the page listens on", validation_alias="UI_HOST")
    port: int = Field(7860, ge=1, le=65535, description="port the page listens on", validation_alias="UI_PORT")
    root_path: str = Field(
        "",
        description="path under which a reverse proxy shows the page, as in /smollm",
        validation_alias="UI_ROOT_PATH",
    )

    @field_validator("api_url")
    @classmethod
    def is_http_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"SMOLLM_API_URL is {url!r}: write it as http://host:port")
        return url.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def empty_is_none(cls, key: SecretStr | None) -> SecretStr | None:
        return key if key is not None and key.get_secret_value() else None


@functools.cache
def get_settings() -> Settings:
    """Return the process's settings."""
    return Settings()
