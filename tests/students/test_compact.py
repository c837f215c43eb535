"""The worked example computes what Llama computes, causally, and keeps packed documents apart."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.models.isolation import isolates_documents
from students.compact import CompactDecoder, document_mask


def small(**changes: object) -> CompactDecoder:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"vocab_size": 61, "hidden_size": 48, "layers": 3, "heads": 6, "key_value_heads": 2}
    model = CompactDecoder(**{**sizes, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "mlp_output": "mlp.down_proj",
}


def as_llama(model: CompactDecoder, tie: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=model.blocks[0].gate.out_features,  # type: ignore[union-attr, arg-type]
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tie,
        pad_token_id=None,
    )
    weights = {}
    for name, value in model.state_dict().items():
        stem, part, _ = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        weights[f"{stem.replace('blocks', 'model.layers')}.{NAMES[part]}.weight".lstrip(".")] = value
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(weights, strict=True)
    return llama


@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_llamas_with_the_same_weights(tie: bool) -> None:
    model = small(rope_theta=500.0, tie_embeddings=tie)
    ids_BL = torch.randint(0, 61, (2, 17))
    packed_BL = torch.cat([torch.arange(11), torch.arange(6)]).expand(2, -1)
    for positions_BL in (torch.arange(17).expand(2, -1), packed_BL):
        with torch.no_grad():
            expected = as_llama(model, tie)(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits
            found = model.head(model.body(ids_BL, positions_BL))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"hidden_size": 384, "layers": 8, "heads": 6}, {"hidden_size": 1024, "layers": 1}])
@pytest.mark.parametrize("tie", [True, False])
def test_a_fresh_one_begins_as_one_that_knows_nothing(sizes: dict[str, int], tie: bool) -> None:
    tokens = 4_096
    torch.manual_seed(0)
    model = CompactDecoder(tokens, **{"heads": 8, **sizes}, tie_embeddings=tie)
    ids_BL = torch.randint(0, tokens, (2, 64))
    with torch.no_grad():
        logits_BLV = model.head(model.body(ids_BL, torch.arange(64).expand(2, -1)))
    loss = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
    assert float(loss) < 1.1 * math.log(tokens)


def test_documents_are_isolated() -> None:
    assert isolates_documents(small(), 61, "cpu")


def test_the_mask_is_none_for_one_document_a_row_and_blocks_other_documents() -> None:
    assert document_mask(torch.arange(5).expand(3, -1)) is None
    mask_BHLL = document_mask(torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]]))
    assert mask_BHLL is not None
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(mask_BHLL[0, 0], expected)
    assert torch.equal(mask_BHLL[1, 0], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("packed", [False, True])
def test_a_later_token_changes_nothing_before_it(packed: bool) -> None:
    model = small()
    ids_BL = torch.randint(0, 60, (1, 12))
    positions_BL = torch.cat([torch.arange(5), torch.arange(7)])[None] if packed else torch.arange(12)[None]
    changed_BL = ids_BL.clone()
    changed_BL[0, 8] = 60
    with torch.no_grad():
        before, after = model.body(ids_BL, positions_BL), model.body(changed_BL, positions_BL)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_every_parameter_learns_and_tying_shares_one() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 61 * 48
    for model in (tied, untied):
        positions_BL = torch.arange(9)[None]
        model.head(model.body(positions_BL, positions_BL)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_fresh_residual_stream_keeps_its_scale_with_depth() -> None:
    ids_BL = torch.randint(0, 500, (1, 64))
    scales = []
    for layers in (2, 24):
        torch.manual_seed(0)
        model = CompactDecoder(500, hidden_size=64, layers=layers, heads=4)
        hidden_BLD = torch.zeros(0)

        def keep(_: object, __: object, output: torch.Tensor) -> None:
            nonlocal hidden_BLD
            hidden_BLD = output

        model.blocks[-1].register_forward_hook(keep)
        model.body(ids_BL, torch.arange(64)[None])
        scales.append(hidden_BLD.std().item())
    assert scales[1] < 1.5 * scales[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "does not split"),
        ({"hidden_size": 18, "heads": 6}, "even size"),
        ({"key_value_heads": 4}, "not a multiple"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
