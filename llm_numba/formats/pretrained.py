"""Published models, downloaded from the Hugging Face hub."""

from collections.abc import Callable, Iterator

import numpy as np
import tiktoken

from llm_numba.formats import huggingface
from llm_numba.models import Model
from llm_numba.util.download import from_hub

PUBLISHED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def open_published(
    name: str,
) -> tuple[Model, Callable[[], tiktoken.Encoding | None], Iterator[tuple[str, np.ndarray]]]:
    """(model, tokenizer, parameters) of OpenAI's GPT-2. Config and tokenizer are downloaded at once, the weights when
    they are used. Errors: UserError if a download fails."""
    repository = PUBLISHED[name]
    from_hub(repository, huggingface.TOKENIZER)
    folder = from_hub(repository, huggingface.CONFIG).parent
    model = huggingface.read_config(folder)

    def parameters():
        from_hub(repository, huggingface.WEIGHTS, revision=folder.name)
        yield from huggingface.read_parameters(folder, model)

    return model, lambda: huggingface.read_tokenizer(folder), parameters()
