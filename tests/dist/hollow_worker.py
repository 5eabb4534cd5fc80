"""One rank of test_hollow.py: models that are split while hollow, then filled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pyllm import LlamaConfig, LlamaForCausalLM, machine
from pyllm.distributed import Cluster
from pyllm.hollow import fill

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=3,
)  # fmt: skip


def filled(cluster: Cluster, config: LlamaConfig, folder: Path | None = None) -> LlamaForCausalLM:
    torch.manual_seed(5 if cluster.main else 99)  # what other ranks draw must not matter
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    cluster.wrap(model)
    fill(model, cluster, folder)
    return model


def main(parallel: str, tensor: str, folder: str) -> None:
    torch.set_num_threads(1)
    cluster = Cluster.join(parallel, int(tensor))
    for config in (
        CONFIG,
        CONFIG.replace(tie_word_embeddings=True, attention_bias=True),
        CONFIG.replace(model_type="qwen3"),
    ):
        torch.manual_seed(5)
        expected = LlamaForCausalLM(config)
        model = filled(cluster, config)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for name, tensor_ in expected.state_dict().items():
            assert name in whole or not cluster.main, name
            if name in whole:
                assert torch.equal(whole[name], tensor_), name
        ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
        with cluster.accumulating(model, True):
            loss = model(ids, labels=ids, return_logits=False).loss
        assert float(loss) == pytest.approx(float(expected(ids, labels=ids).loss), rel=1e-5)
        assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())

    size = sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters()) * 4
    most = machine.peak_allocated(lambda: filled(cluster, CONFIG))
    assert most < 0.5 * size + size / CONFIG.num_hidden_layers + 1e6, f"{most / 1e6:.1f} of {size / 1e6:.1f} MB"

    if cluster.main:
        torch.manual_seed(6)
        LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder)
    cluster.barrier()
    stored = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    model = filled(cluster, CONFIG, Path(folder))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(whole[name], tensor_) for name, tensor_ in stored.state_dict().items() if name in whole)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):  # on every rank, though one alone reads the files
        filled(cluster, CONFIG.replace(vocab_size=1024), Path(folder))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
