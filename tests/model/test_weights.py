from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from semipd.core.errors import ConfigError
from semipd.core.types import Slice
from semipd.model.dense import load_model
from semipd.model.weights import INDEX, SafetensorsWeights
from tests.checkpoints import make_checkpoint
from tests.model.stepping import Bench


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", num_hidden_layers=1)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint; None deletes one."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": None})
    assert "model.layers.0.mlp.up_proj.weight" in refusal(folder)


def test_a_misshapen_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(47)})
    assert "model.norm.weight has shape [47], not [48]" in refusal(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    assert "model.norm.weight" in refusal(folder)


def test_leftover_tensors_mean_another_model(folder: Path) -> None:
    """A bias that the config does not announce would otherwise be dropped and the text be subtly wrong."""
    rewrite(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(folder)


def test_what_the_config_already_says_may_be_left_over(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_hidden_layers=1, tied=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(
        folder,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "lm_head.weight": embedding.clone(),
        },
    )
    load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000, -10])
def test_a_truncated_file_is_one_line(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(folder)


def test_no_weights_is_one_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "model.safetensors is missing (only safetensors are read)" in refusal(folder)


def test_broken_shards_are_one_line(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", shard_size="50KB")
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    load_model(folder)

    moved = dict(index["weight_map"], **{"model.norm.weight": shards[0]})
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert "model.norm.weight" in refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "outside" in refusal(folder)
    for broken in ("{", "{}", "[]", '{"weight_map": 3}'):
        (folder / INDEX).write_text(broken)
        assert INDEX in refusal(folder)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / shards[1]).unlink()
    assert shards[1] in refusal(folder)


def test_float16_becomes_bfloat16_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=1, dtype="float16")
    with caplog.at_level(logging.INFO):
        assert load_model(folder).dtype == torch.bfloat16
    assert "float16" in caplog.text and "bfloat16" in caplog.text
    assert load_model(folder, dtype="float32").dtype == torch.float32


def test_the_dtype_is_the_checkpoints_own(tmp_path: Path) -> None:
    """Even when its config does not say it."""
    folder = make_checkpoint(tmp_path, "llama", num_hidden_layers=1, dtype="bfloat16")
    assert load_model(folder).dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype == torch.bfloat16


def test_tensors_do_not_keep_the_file_mapped(folder: Path) -> None:
    """Views into the mapped file would count as memory beside the packed weights."""
    weights = SafetensorsWeights(folder, "auto", "float32")
    tensor = weights.take("model.norm.weight", (48,))
    weights._taken.update(weights._where)
    weights.finish()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert tensor.untyped_storage().nbytes() == 48 * 4


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_does_not_keep_its_file_mapped(tmp_path: Path, packed: bool) -> None:
    """Linear layers are made from views of it; one that kept its view would read what is written there."""
    folder = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=1, dtype="bfloat16")
    model = load_model(folder, pack=packed, kernels=packed)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model.dtype == torch.bfloat16


def test_matrices_may_begin_between_words(tmp_path: Path) -> None:
    """Pairs of numbers are moved as one when they are packed."""
    matrix = torch.randn(32, 64).bfloat16()
    save_file({"a": torch.ones(3, dtype=torch.bfloat16), "b": matrix}, tmp_path / "model.safetensors")
    found = SafetensorsWeights(tmp_path, "auto", "bfloat16").matrix("b", (32, 64))
    assert isinstance(found, torch.Tensor) and found.data_ptr() % 4 == 0
    assert torch.equal(found, matrix)


def test_dummy_weights_need_only_a_config_and_stay_finite(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "a", "qwen3", num_hidden_layers=6)
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    logits = []
    for seed in (0, 0, 1):
        bench = Bench(load_model(folder, load_format="dummy", seed=seed, dtype="bfloat16"))
        bench.open(0, range(60))
        bench.run(Slice(0, 0, 60))
        logits.append(bench.recorder.logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert 0.1 < float(logits[0].std()) < 10


def test_unknown_formats_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="pickle"):
        load_model(folder, load_format="pickle")
    with pytest.raises(ConfigError, match="int8"):
        load_model(folder, dtype="int8")
