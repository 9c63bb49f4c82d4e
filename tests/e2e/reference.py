"""What a server has to say, computed apart from it: by transformers in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant import artifact, tokens
from quant.intake import source
from quant.proof import replica

TEXT = (
    "The river rises in the mountains, crosses the plain and reaches the sea near the old harbour. "
    "Its valley has been settled for three thousand years; the bridges are younger."
)


@torch.inference_mode()
def log_probabilities(folder: Path, text: str = TEXT) -> Tensor:
    """Of each token of the text after the first, in nats."""
    model = _model(folder)
    ids = torch.tensor(tokens.of_text(text, tokens.load_tokenizer(folder)))
    logits = model(input_ids=ids[None]).logits[0, :-1]
    found: Tensor = logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
    return found


@torch.inference_mode()
def leads(folder: Path, question: str, tokens_of_parent: list[int]) -> Tensor:
    """By how many nats each of these tokens, one after the other behind a chat with `question`,
    leads the likeliest other one; negative where another leads."""
    model, tokenizer = _model(folder), tokens.load_tokenizer(folder)
    asked = tokens.of_chat([{"role": "user", "content": question}], tokenizer, asks=True)
    ids, said = torch.tensor([*asked, *tokens_of_parent]), torch.tensor(tokens_of_parent)
    chances = model(input_ids=ids[None]).logits[0, len(asked) - 1 : -1].log_softmax(dim=-1)
    own = chances.gather(1, said[:, None])[:, 0]
    others = chances.scatter(1, said[:, None], -torch.inf).amax(dim=1)
    found: Tensor = own - others
    return found


def _model(folder: Path) -> PreTrainedModel:
    """The embedded model with the weights of an artifact of it, W8A8's inputs rounded, or with its
    own."""
    opened, device = source.open(source.DEMO), torch.device("cpu")
    manifest = artifact.read(folder)
    if manifest is None:
        return replica.of_parent(opened, device)
    return replica.of_artifact(opened, folder, manifest, device)
