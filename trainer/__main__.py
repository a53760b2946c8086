"""`python -m trainer`: from your text to a checked export. Errors are one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from shared.errors import SmolLMError

DESCRIPTION = """\
Train a small language model on your own text through a staged curriculum.

  python -m trainer train cpu                     everything: data, training, plots, export to models/cpu
  python -m trainer train original --run mine     the whole SmolLM2-135M; wants a GPU
  python -m trainer train cpu --set learning_rate=1e-3 --run slow     any key of a recipe can be changed, as here
  python -m trainer train cpu --set num_steps=99 --set 'stages=[{name="A",start_step=0,end_step=99,shares={input=1}}]'
  python -m trainer train my_recipe.toml          a recipe of your own: copy one of trainer/recipes/

Put your text into data/input.txt, data/code.txt, data/math.txt, or name it: --text input=books/ --text code='src/*.py'.
What is missing is brought or generated.
The same `train` command resumes a run that was stopped, killed or rebooted, to the same final weights.
SMOLLM_DATA_DIR, SMOLLM_RUNS_DIR and SMOLLM_MODELS_DIR move data/, runs/ and models/."""


class AddText(argparse.Action):
    """`--text SOURCE=PATH` as the change of `data.files.SOURCE` that it is; several of one source add up."""

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, _: Any = None) -> None:
        source, separator, path = str(value).partition("=")
        if not (source and separator and path):
            parser.error(f"--text {value!r} is not of the form SOURCE=PATH")
        options.texts = getattr(options, "texts", {})
        options.texts.setdefault(source, []).append(path)
        options.overrides = [*options.overrides, f"data.files.{source}={json.dumps(options.texts[source])}"]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    recipe_options = argparse.ArgumentParser(add_help=False)
    recipe_options.add_argument("recipe", metavar="RECIPE", help="a name in trainer/recipes, or a TOML file's path")
    recipe_options.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one key of the recipe, a dotted one inside its table (data.vocab_size=8192); may be repeated",
    )
    recipe_options.add_argument(
        "--text",
        action=AddText,
        dest="overrides",
        metavar="SOURCE=PATH",
        help="a source's text: a file, a folder or a glob (code='src/**/*.py'); may be repeated",
    )
    run_options = argparse.ArgumentParser(add_help=False)
    run_options.add_argument("run", metavar="RUN", help="a folder in runs/")
    checkpoint_options = argparse.ArgumentParser(add_help=False)
    checkpoint_options.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last (default), best, or a step's number"
    )

    commands.add_parser("recipe", help="name the recipe that suits this machine")
    commands.add_parser("prepare", parents=[recipe_options], help="bring the text and turn it into tokens")
    commands.add_parser(
        "plan", parents=[recipe_options], help="show tokens, epochs and repeats per stage and source, train nothing"
    )
    train = commands.add_parser("train", parents=[recipe_options], help="train, or resume; then plot and export")
    train.add_argument("--run", metavar="NAME", help="folder in runs/ and export in models/; default: recipe's name")
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the recipe changes what comes: steps, stages to come, learning rate, clipping, dtype",
    )
    train.add_argument("--dry-run", action="store_true", help="prepare, check and print the plan, then stop")
    commands.add_parser("evaluate", parents=[run_options, checkpoint_options], help="held-out loss of a checkpoint")
    sample = commands.add_parser("sample", parents=[run_options, checkpoint_options], help="let a checkpoint write")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="default: the recipe's prompts")
    sample.add_argument("--tokens", type=int, metavar="N", help="tokens per text; default: the recipe's")
    sample.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest; default: the recipe's")
    sample.add_argument("--seed", type=int, metavar="N", help="default: the recipe's")
    commands.add_parser("plot", parents=[run_options], help="draw runs/RUN/plots/*.png, also of a run still going")
    export = commands.add_parser(
        "export", parents=[run_options, checkpoint_options], help="write a checkpoint as models/NAME"
    )
    export.add_argument("--name", metavar="NAME", help="default: the recipe's export_name, else the run's name")
    export.add_argument(
        "--gguf",
        action="append",
        nargs="?",
        choices=("f16", "q8_0"),
        const="f16",
        default=[],
        help="write a GGUF file for llama.cpp as well: f16 (default) or q8_0; may be repeated",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 where the user has something to mend."""
    options = build_parser().parse_args(arguments)
    from trainer import commands  # after the parser, so that --help needs no torch
    from trainer.memory import memory_errors

    try:
        with memory_errors():
            print_lines = getattr(commands, options.command)(options)
    except SmolLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for line in print_lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
