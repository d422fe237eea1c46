"""`python -m pipeline push`: the student of a complete run, with its model card, to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEXT = """Upload a run's trained student to the Hugging Face Hub, or to another server of its kind (HF_ENDPOINT).

  python -m pipeline push runs/mine --to NAME/MODEL --dry-run
  python -m pipeline push runs/mine --to NAME/MODEL --private

What is uploaded is RUN/student: weights, configs, tokenizer, processor and README.md, the model card, which is first
written anew from the run's files, with the newest evaluation. With --dry-run nothing leaves the machine: the files and
their sizes are listed. The token is that of `hf auth login`, or the environment variable HF_TOKEN. A repository of that
name is made where there is none; --private then makes it private.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `push`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--to", required=True, metavar="NAME", help="the repository, such as OWNER/MODEL")
    parser.add_argument("--private", action="store_true", help="make a private repository, where there is none yet")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded; upload nothing")


def run(options: argparse.Namespace) -> None:
    """Upload, or say what would be. Raises RecipeError where that cannot be, before anything is sent."""
    from pipeline.runtime.display.progress import say, size_text

    student = _student(options.run)
    _check_name(options.to)
    files = upload_files(student)
    total = size_text(sum(size for _, size in files))
    if options.dry_run:
        for name, size in files:
            say(f"{size:>15,}  {name}")
        say(f"--dry-run: would upload {len(files)} files, {total}, from {student} to {options.to}; nothing was sent")
        return
    say(f"uploading {len(files)} files, {total}, from {student} to {options.to}")
    say(f"the student is at {_upload(student, options.to, options.private)}")


def upload_files(student: Path) -> list[tuple[str, int]]:
    """(name, bytes) of all files of a student's folder."""
    found = sorted(path for path in student.rglob("*") if path.is_file())
    return [(path.relative_to(student).as_posix(), path.stat().st_size) for path in found]


def _student(run: Path) -> Path:
    """The folder of the finished student, its card written anew. Raises RecipeError where the run is not complete."""
    from pipeline.errors import RecipeError
    from pipeline.results.status import status
    from pipeline.runtime.display.progress import say
    from pipeline.runtime.folder import done
    from pipeline.runtime.model_card.card import write_card

    _, following = status(run)
    student = run / "student"
    if done(run / "reinforce") is None or not student.is_dir():
        raise RecipeError(f"{run} has no finished student to upload: stage 2 is not complete. Run: {following}")
    if not write_card(run, student):
        say(f"{student}/README.md is your own and stays as it is")
    return student


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from pipeline.errors import RecipeError

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(f"--to {name}: expected a name such as OWNER/MODEL: {error}") from None


def _upload(student: Path, name: str, private: bool) -> str:
    """Make the repository where there is none, and upload in one commit. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(name):
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=student, commit_message="Student distilled by VLsI")
    return str(address)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the hub and the network answer into an error that says what to do."""
    # HTTPError is that of the HTTP library that this huggingface_hub uses; which one changed with its version 2
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from pipeline.errors import RecipeError

    retry = "Then run the same command again"
    try:
        yield
    except LocalTokenNotFoundError:
        raise RecipeError(f"no token for {name}: expected one from `hf auth login` or HF_TOKEN. {retry}") from None
    except OfflineModeIsEnabled:
        raise RecipeError(f"HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it. {retry}") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        about = (
            "the token may not write there: `hf auth login` with one that may" if code in (401, 403) else "see above"
        )
        raise RecipeError(f"the hub refused the upload to {name}: {error}\n{about}. {retry}") from None
    except HTTPError as error:
        raise RecipeError(
            f"the hub cannot be reached for {name}: {error or type(error).__name__}. Expected a network, or "
            f"the address of a server of its kind in HF_ENDPOINT. {retry}"
        ) from None
