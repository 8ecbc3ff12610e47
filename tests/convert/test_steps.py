"""The steps that a plan names are those that turn the source's bytes into the golden files of other converters."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from ckpt_convert.convert.api import plan_conversion
from ckpt_convert.convert.explain import TensorTransform, explain_plan
from tests.helpers import CASES, GOLDEN, bits, read_meta, read_safetensors


def steps(src: Path, to: str, **options: object) -> dict[str, TensorTransform]:
    """What happens to each tensor, by the source's key (tied ones that are not stored have that of their twin)."""
    made = plan_conversion(src, to=to, **options)  # type: ignore[arg-type]
    found = list(explain_plan(made))
    assert sum(move.nbytes for move in found) == made.tensor_bytes
    assert len([move for move in found if move.target in made_keys(made)]) == made.tensors
    return {move.source: move for move in found}


def made_keys(made: object) -> set[str]:
    return {tensor.key for file in made.weights for tensor in file.layout.header.tensors}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("case", "ranks"), [*[(case, n) for case in ("llama", "llama2", "llama_tied") for n in (1, 2, 4)], ("mistral", 1)]
)
def test_the_steps_to_meta_lead_to_the_golden_files(case: str, ranks: int) -> None:
    source = read_safetensors(GOLDEN / case / "hf")
    golden = read_meta(GOLDEN / case / f"meta-mp{ranks}")
    style = "llama2" if case == "llama2" else None
    made = plan_conversion(GOLDEN / case / "hf", to="meta", model_parallel=ranks, meta_style=style)
    for move in explain_plan(made):
        assert move.target is not None
        parts = [rank[move.target] for rank in golden]
        tensor = source[move.source]
        assert (move.shape, move.dtype, move.target_dtype) == (tuple(tensor.shape), "F32", "F32")
        said = ", ".join(move.steps)
        cut = re.search(rf"split over {ranks} ranks on axis (\d)", said)
        if ranks > 1:
            assert (cut is None) == (f"replicated on {ranks} ranks" in said), said
        whole = torch.cat(parts, int(cut[1])) if cut else parts[0]
        assert cut or all(torch.equal(part, whole) for part in parts)
        assert (bits(whole) == bits(tensor)) == ("rope half→interleaved" not in said), move
        assert (said == "copy") == (ranks == 1 and bits(whole) == bits(tensor) and "tied" not in said)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["hf", "meta", "native"])
@pytest.mark.parametrize("source", ["hf", "meta-mp1", "meta-mp2", "meta-mp4"])
def test_every_byte_that_is_written_is_in_a_step(case: str, source: str, to: str) -> None:
    path = GOLDEN / case / source
    if case == "mistral" and source in ("meta-mp2", "meta-mp4"):
        return  # its consolidated layout is never cut
    for ranks in (1, 2, 4) if to == "meta" and case != "mistral" else (None,):
        assert steps(path, to, model_parallel=ranks)


def test_what_is_joined_cut_anew_and_kept() -> None:
    meta = GOLDEN / "llama2" / "meta-mp4"
    back = steps(meta, "hf")
    assert back["layers.1.attention.wq.weight"].steps == ("join 4 ranks on axis 0", "rope interleaved→half")
    assert back["layers.1.attention.wo.weight"].steps == ("join 4 ranks on axis 1",)
    assert back["tok_embeddings.weight"].steps == ("join 4 ranks on axis 1",)
    assert back["norm.weight"].steps == ("one of 4 copies",)
    assert back["output.weight"].steps[0] == "tied if equal"
    assert back["rope.freqs"].target is None
    assert back["rope.freqs"].steps == ("kept in the record",)
    anew = steps(meta, "meta", model_parallel=2)
    assert anew["layers.1.attention.wq.weight"].steps == ("4→2 ranks on axis 0",)
    assert anew["norm.weight"].steps == ("replicated on 2 ranks",)
    kept = steps(meta, "meta")
    assert {move.steps for move in kept.values()} == {("copy",), ("tied if equal",)}
    other = steps(meta, "meta", meta_style="llama3")
    assert other["tok_embeddings.weight"].steps == ("join 4 ranks on axis 1", "split over 4 ranks on axis 0")


def test_casts_come_between_reading_and_cutting() -> None:
    found = steps(GOLDEN / "llama" / "hf", "meta", model_parallel=2, dtype="bfloat16")
    move = found["model.layers.0.self_attn.k_proj.weight"]
    assert move.steps == ("rope half→interleaved", "cast F32→BF16", "split over 2 ranks on axis 0")
    assert (move.dtype, move.target_dtype, move.nbytes) == ("F32", "BF16", 24 * 72 * 2)
    norm = found["model.norm.weight"]
    assert norm.nbytes == 2 * 72 * 2


def test_tied_tensors(tmp_path: Path) -> None:
    made = plan_conversion(GOLDEN / "llama_tied" / "hf", to="meta")
    (move,) = [move for move in explain_plan(made) if move.target == "output.weight"]
    assert move.source == "model.embed_tokens.weight"
    assert move.steps == ("tied: written as well",)
    assert "lm_head.weight" not in {move.target for move in steps(GOLDEN / "llama_tied" / "hf", "native").values()}
    hf = Path(shutil.copytree(GOLDEN / "llama_tied" / "hf", tmp_path / "hf"))
    (hf / "model.safetensors.index.json").unlink()
    stored = read_safetensors(hf)["model.embed_tokens.weight"]
    import safetensors.torch

    safetensors.torch.save_file({"lm_head.weight": stored.clone()}, hf / "more.safetensors")
    found = steps(hf, "native")["lm_head.weight"]
    assert (found.target, found.nbytes, found.steps) == (None, 0, ("tied: stored once",))


def test_what_comes_back_from_the_record_and_what_is_stored_transposed(tmp_path: Path) -> None:
    from ckpt_convert import convert_checkpoint

    convert_checkpoint(GOLDEN / "llama2" / "meta-mp1", tmp_path / "hf", to="hf")
    assert steps(tmp_path / "hf", "meta")["rope.freqs"].steps == ("restored from the record",)
    tensors = read_safetensors(tmp_path / "hf")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].T.contiguous().T
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(GOLDEN / "llama2" / "hf" / "config.json", bare)
    torch.save(tensors, bare / "pytorch_model.bin")
    assert steps(bare, "native")[key].steps == ("laid out row by row",)
    assert steps(bare, "hf")[key].steps == ("copy",)
