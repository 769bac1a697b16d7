"""Temperatures against a model whose over-confidence is known."""

import pytest
import torch

from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.training.calibration import calibrate

SPACE = TokenSpace(
    {"map": Modality("grid", vocab_size=6, grid=(4, 8)), "other": Modality("grid", vocab_size=4, grid=(1, 2))}
)


@pytest.mark.parametrize("factor", [0.8, 1.0, 2.5])
def test_finds_how_much_too_sure_a_model_is(factor):
    """Ids are drawn from the model's own probabilities; then its scores of them are multiplied."""
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="nano", dim=16, heads=2, encoder_depth=1, decoder_depth=1), SPACE).eval()
    with torch.no_grad():
        model.decoder_embeddings.tokens.weight.mul_(6)
        empty = {"map": torch.zeros(32, dtype=torch.long).numpy(), "other": torch.zeros(2, dtype=torch.long).numpy()}
        probe = transfer_batch(SPACE, [empty], [], ["map"])
        drawn = torch.distributions.Categorical(logits=model.logits(model(probe), "map")[0]).sample((200,))
        batch = transfer_batch(SPACE, [{**empty, "map": ids.numpy()} for ids in drawn], [], ["map"])
        model.decoder_embeddings.tokens.weight[SPACE.vocabulary("map")] *= factor
        before = model.token_nll(batch).mean()
    chosen = calibrate(model, [batch])
    assert chosen["map"] == pytest.approx(factor, rel=0.08) and list(chosen) == ["map"]
    assert float(model.temperature[SPACE.number["other"]]) == 1.0
    assert model.token_nll(batch).mean() <= before
