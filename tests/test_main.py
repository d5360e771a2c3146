"""The command line."""

from __future__ import annotations

import pytest
import torch

import flashlla
from flashlla.__main__ import main

pytestmark = pytest.mark.quick


def test_info(capsys, monkeypatch):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        flashlla.__version__,
        torch.__version__.split("+")[0],
        "chunked",
        "naive",
        "can run",
        "scipy",
        "transformers",
        "tqdm",
    ):
        assert word in out
    assert "auto; tried in this order:" in out
    assert "memory quadratic in length; can run" in out
    monkeypatch.setenv("FLASHLLA_BACKEND", "nave")
    main(["info"])
    assert "naive; auto tries them in this order:" in capsys.readouterr().out


def test_verify_command(capsys):
    arguments = ["verify", "--length", "40", "--dim", "8", "--heads", "1", "--device", "cpu", "--rows", "5"]
    assert main([*arguments, "--backend", "chunked", "--per-row"]) == 0
    out = capsys.readouterr().out
    assert "5 queries" in out
    assert "limit 1e-02" in out
    assert out.count("\n") >= 10
    assert main([*arguments, "--tolerance", "1e-30"]) == 1
    assert "try --solver direct" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit):
        main([*arguments, "--backend", "nave"])
    assert "did you mean 'naive'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "meta"])
    assert "--device: got 'meta'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "pcg_gram" in (told := capsys.readouterr().out)
    assert "(default: 512)" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_verify_command_without_cuda(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--device", "cuda"])
    assert caught.value.code == 2
    assert "--device: got 'cuda'" in capsys.readouterr().err
