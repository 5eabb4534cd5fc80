"""The loop that a GPU replays as a graph computes what the plain loop does: without a graph here, with one on a GPU."""

from __future__ import annotations

import pytest
import torch

from model.reference import pair, prompts
from pyllm import graph
from pyllm.generate import Call
from pyllm.options import GenerationConfig

NEW = 40
EOS = [5, 9, 40, 77, 101, 102, 103, 110, 111, 112]
OPTIONS = {
    "greedy": {"eos_token_id": None},
    "ends": {"eos_token_id": EOS, "pad_token_id": 0},
    "sampled": {"eos_token_id": EOS, "pad_token_id": 0, "do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "several": {"eos_token_id": None, "do_sample": True, "min_p": 0.1, "num_return_sequences": 2},
    "two tokens": {"eos_token_id": None, "max_new_tokens": 2},
    "one token": {"eos_token_id": None, "max_new_tokens": 1},
}


@pytest.fixture
def on_device(monkeypatch):
    """Make a CPU take the GPU's way."""
    calls = []
    decode = graph.decode

    def count(call, *args):
        calls.append(call)
        return decode(call, *args)

    def switch():
        cache = Call._cache

        def make(self, *args):
            self.on_device = graph.fits(self.config) and args[0] is None
            return cache(self, *args)

        monkeypatch.setattr(Call, "_cache", make)
        monkeypatch.setattr(graph, "decode", count)

    return switch, calls


@pytest.mark.parametrize(
    "family, padding",
    [
        ("llama", None),
        ("llama", "left"),
        ("mistral", "left"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mistral", None), ("qwen3", None), ("qwen3", "left"))
        ),
    ],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_step_computes_what_the_plain_loop_does(name, padding, family, on_device):
    switch, calls = on_device
    _, ours = pair(family, **({"sliding_window": 6} if family == "mistral" else {}))
    ids, mask, _ = prompts(padding)
    options = {"max_new_tokens": NEW, "seed": 3, "return_dict_in_generate": True, **OPTIONS[name]}
    plain = ours.generate(ids, mask, **options)
    switch()
    out = ours.generate(ids, mask, **options)
    assert bool(calls) == (name != "one token")
    assert torch.equal(out.sequences, plain.sequences)
    assert len(out.past_key_values) == out.sequences.shape[1] - 1
    pieces = []
    streamer = type("S", (), {"put": lambda self, ids: pieces.append(ids), "end": lambda self: None})()
    again = ours.generate(ids, mask, streamer=streamer, **options).sequences
    assert torch.equal(again, plain.sequences)
    if name != "several":
        assert torch.equal(torch.cat((pieces[0], torch.stack(pieces[1:], 1)), 1), plain.sequences)


def test_a_step_has_fixed_addresses(on_device):
    """What a graph needs: whatever a step writes stays where it is."""
    switch, _ = on_device
    switch()
    _, ours = pair()
    ids, mask, _ = prompts("left")
    loops = []
    make = graph.DeviceLoop.__init__

    def remember(self, *args):
        make(self, *args)
        loops.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph.DeviceLoop, "__init__", remember)
        tokens = iter(Call(ours, ids, mask, None, {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0},
                           None, None, None, None, None, (), ()).steps())  # fmt: skip
        next(tokens)
        loop = loops[0]
        state = [t for t in vars(loop).values() if isinstance(t, torch.Tensor)]
        state += [*loop.cache.keys, *loop.cache.values, loop.cache.lengths]
        addresses = [t.data_ptr() for t in state]
        for _ in range(5):
            next(tokens)
        assert [t.data_ptr() for t in state] == addresses
        assert loop.cache.lengths is state[-1]


def test_what_needs_the_host_stays_out():
    assert graph.fits(GenerationConfig())
    assert graph.fits(GenerationConfig(do_sample=True, top_k=4, renormalize_logits=True, min_new_tokens=0))
    for options in (
        {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[3]]}, {"stop_strings": "x"},
        {"min_new_tokens": 2}, {"num_beams": 2}, {"use_cache": False}, {"max_time": 3.0},
        {"return_dict_in_generate": True, "output_scores": True},
    ):  # fmt: skip
        assert not graph.fits(GenerationConfig(**options)), options


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_a_graph_gives_the_same_tokens(name, monkeypatch):
    _, ours = pair()
    ours.cuda()
    ids, mask, _ = prompts("left")
    ids, mask = ids.cuda(), mask.cuda()
    options = {"max_new_tokens": NEW, "seed": 3, **OPTIONS[name]}
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    fast = ours.generate(ids, mask, **options)
    assert bool(replays) == (options["max_new_tokens"] > 5)
    monkeypatch.setattr(graph, "fits", lambda config: False)
    assert torch.equal(fast, ours.generate(ids, mask, **options))
