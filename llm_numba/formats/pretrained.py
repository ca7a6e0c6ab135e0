"""Weights to start from: GPT-2 as published, a folder of Hugging Face's, llm.c's .bin, or one of our own runs."""

from pathlib import Path

from llm_numba.formats import huggingface
from llm_numba.util.cli import UserError

PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
LLMC_MODEL, LLMC_TOKENIZER = "model.bin", "gpt2_tokenizer.bin"  # of an export; llm.c's programs ask for the second


def open_published(name: str):
    """OpenAI's GPT-2; its sizes and tokenizer are fetched at once, its weights when they are asked for."""
    folder = fetch(name, [huggingface.CONFIG, huggingface.TOKENIZER])
    config = huggingface.read_config(folder)

    def parameters():
        fetch(name, [huggingface.WEIGHTS], revision=folder.name)
        yield from huggingface.read_parameters(folder, config)

    return config, lambda: huggingface.read_tokenizer(folder), parameters()


def fetch(name: str, files: list[str], revision: str | None = None) -> Path:
    """The folder in Hugging Face's cache that has these files of a published model, downloaded where they are missing.

    A download that was cut goes on where it stopped. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE hold as usual.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f'{name}: downloads need huggingface_hub: pip install "llm-numba[download]"') from error
    try:
        paths = [Path(hf_hub_download(PUBLISHED[name], file, revision=revision)) for file in files]
    except Exception as error:  # of the network, of the hub, of the disk: they share no class
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"{name}: cannot be downloaded ({type(error).__name__}: {reason}); try again, and it goes on where it "
            "stopped; or give a folder that has the files"
        ) from error
    return paths[0].parent
