"""The commands of the benchmarks: what they print and write, on a CPU at tiny sizes."""

import json
from pathlib import Path

import pytest
import torch
from bench_cases import is_png, written

from moefp8.bench import accumulation, problem, quantize
from moefp8.bench.__main__ import main
from moefp8.bench.markdown import render


def test_grouped_mm_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = "grouped-mm --device cpu --shape 64,32,32 --groups 2 --repeats 2 --recipe mxfp8 --unequal 32"
    main([*args.split(), "--json", str(tmp_path / "g.json"), "--png", str(tmp_path / "g.png")])
    rows = written(tmp_path / "g.json")["rows"]
    assert {row["layout"] for row in rows} == {"equal", "unequal"}
    ours = [row for row in rows if row["candidate"] == "moefp8 mxfp8"]
    assert all(row["speedup"] > 0 and row["missing"] is None for row in ours)
    assert "over_equal" in ours[1]
    assert next(row for row in rows if row["candidate"] == "torch bf16")["speedup"] == 1.0
    assert is_png(tmp_path / "g.png")
    assert is_png(tmp_path / "g-roofline.png")
    assert "over equal groups" in render(tmp_path / "g.json")
    printed = capsys.readouterr().out
    assert "moefp8 mxfp8" in printed
    assert "needs a CUDA device" in printed


def test_gemm_command(tmp_path: Path) -> None:
    args = "gemm --device cpu --shape 128,32,32 --groups 2 --repeats 1 --promote 128 --promote never"
    main([*args.split(), "--json", str(tmp_path / "p.json"), "--png", str(tmp_path / "p.png")])
    rows = written(tmp_path / "p.json")["rows"]
    assert {row["product"] for row in rows} == {"fwd", "dgrad", "wgrad"}
    names = {row["candidate"] for row in rows if row["missing"] is None}
    assert names == {"torch bf16", "moefp8, promoted every 128", "moefp8, never promoted"}
    assert all(row["rate"] > 0 for row in rows if row["missing"] is None)
    assert {row["missing"] for row in rows} == {None, "needs a CUDA device"}
    assert is_png(tmp_path / "p.png")
    assert "| 128, 32, 32, 2: wgrad |" in render(tmp_path / "p.json")


def test_quantize_command(tmp_path: Path) -> None:
    args = "quantize --device cpu --shape 64,32,32 --groups 2 --repeats 1"
    args += " --without rowwise --without cotangent"
    main([*args.split(), "--json", str(tmp_path / "q.json"), "--png", str(tmp_path / "q.png")])
    rows = written(tmp_path / "q.json")["rows"]
    ours = [row for row in rows if row["candidate"].startswith("moefp8")]
    assert len(ours) == 5 + len(quantize.REFERENCE)
    assert all(row["copy_share"] > 0 for row in ours)
    assert is_png(tmp_path / "q.png")
    assert "| moefp8 rows of activation, mx |" in render(tmp_path / "q.json")


def test_accumulation_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = "accumulation --device cpu --contraction 64 --size 32 --recipe mxfp8 --promote 64 --repeats 1"
    args += " --intervals 128 never --shape 128,64,32,1 --without torchao"
    main([*args.split(), "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")])
    rows = written(tmp_path / "a.json")["rows"]
    sqnr = {(r["candidate"], r["setting"], r["product"]): r["value"] for r in rows if r["kind"] == "sqnr"}
    assert {r["promote"] for r in rows if r["kind"] == "promotion"} == {None, 128, problem.NEVER}
    for setting in accumulation.DISTRIBUTIONS:
        for product in accumulation.PRODUCTS:
            # The reference's own span is 32: its MXFP8 is true MX to the bit, whatever the promotion.
            true = sqnr[accumulation.TRUE_MX, setting, product]
            assert sqnr["moefp8 mxfp8, promote=64", setting, product] == true
    assert is_png(tmp_path / "a.png")
    assert is_png(tmp_path / "a-sqnr.png")
    assert is_png(tmp_path / "a-promotion.png")
    assert "| fwd | moefp8, never promoted |" in render(tmp_path / "a.json")
    assert "lognormal" in capsys.readouterr().out


def test_markdown_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Worked by hand: two candidates on one shape, the third missing."""
    problem_ = {"m": 64, "k": 32, "n": 48, "groups": 2}
    row = {"problem": problem_, "layout": "equal", "whole": True, "missing": None, "rate": 2e12}
    content = {
        "command": "python -m moefp8.bench grouped-mm --groups 2",
        "environment": {"date": "today", "device": "a card", "torch": "2", "triton": None},
        "rows": [
            {**row, "candidate": "torch bf16", "median_s": 0.004, "speedup": 1.0},
            {**row, "candidate": "moefp8 mxfp8", "median_s": 0.002, "speedup": 2.0, "copy_share": 0.5},
            {**row, "candidate": "a peer", "missing": "not installed"},
        ],
    }
    (tmp_path / "g.json").write_text(json.dumps(content))
    main(["markdown", str(tmp_path / "g.json")])
    printed = capsys.readouterr().out.split("\n")
    assert printed[0] == "a card, torch 2, today: `python -m moefp8.bench grouped-mm --groups 2`"
    assert printed[2:5] == [
        "| M, N, K, G | torch bf16 | moefp8 mxfp8 |",
        "| --- | --- | --- |",
        "| 64, 48, 32, 2 | 4.00 ms | 2.00 ms = 2.00x |",
    ]
    assert printed[8] == "| 64, 48, 32, 2 | 2 TFLOP/s | 2 TFLOP/s, 50 % of copy |"
    assert printed[10] == "Missing: a peer: not installed."


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"No CUDA device(.|\n)*quantize --device cpu"):
        main(["quantize"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("grouped-mm --shape 1,2", "expected M,K,N, got '1,2'"),
        ("grouped-mm --shape 1,2,0", "expected positive M,K,N"),
        ("quantize --repeats 0", "expected a positive number"),
        ("accumulation --recipe fp4", "invalid choice: 'fp4'"),
    ],
)
def test_wrong_arguments(args: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(args.split())
    assert message in capsys.readouterr().err


def test_groups_of_no_published_shape() -> None:
    with pytest.raises(SystemExit, match=r"the published shapes have \[4\]; others need a --shape"):
        main(["quantize", "--device", "cpu", "--groups", "3"])


# Importing torchao 0.18 under Python 3.12.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")
@pytest.mark.gpu
def test_commands_on_a_gpu(tmp_path: Path) -> None:
    shape = "--shape 1024,512,512 --groups 4 --repeats 2"
    for command in (
        f"grouped-mm {shape} --unequal 32",
        f"gemm {shape} --promote 128 --promote never",
        f"quantize {shape}",
        "accumulation --contraction 1024 --shape 1024,512,512,4 --repeats 2",
    ):
        path = tmp_path / "x.json"
        main([*command.split(), "--json", str(path), "--png", str(tmp_path / "x.png")])
        ours = [row for row in written(path)["rows"] if row["candidate"].startswith("moefp8")]
        assert all(row["missing"] is None for row in ours if "reference" not in row["candidate"])
