"""What the commands of evaluation have in common."""

from pathlib import Path

import click

DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
DTYPE = click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                      show_default=True, help="Precision of the weights; auto: the model's own.")  # fmt: skip
TEACHER_CACHE = click.option("--cache", "cache_dir", type=DIRECTORY,
                              help="If a Hub id made this cache, take the commit that made it.")  # fmt: skip


def quieten() -> None:
    """Keep transformers' own bars and deprecation notes out of ours."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
