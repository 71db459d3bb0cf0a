"""The table of constants on the device: made once, by a thread of its own, and by fills alone."""

from __future__ import annotations

import threading

import pytest
import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.kernels import normalisation

    monkeypatch.setattr(normalisation, "_tables", {})


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("image", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_the_table_holds_the_constants(image: torch.dtype, channels: int) -> None:
    from fastvit.kernels.normalisation import channel_constants, constants_on_device

    mean, std = [0.1 + 0.01 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    constants = channel_constants(mean, std, channels, image, torch.bfloat16)
    table = constants_on_device(constants, DEVICE)
    assert table.device == DEVICE and table.cpu().equal(torch.tensor(constants).T)
    assert constants_on_device(list(constants), DEVICE) is table


def test_a_table_that_stays_is_made_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes and memory pools belong to a thread; what outlives the call must come from neither."""
    from fastvit.kernels import normalisation

    threads, fill = [], normalisation._fill
    monkeypatch.setattr(normalisation, "_fill", lambda *key: threads.append(threading.get_ident()) or fill(*key))
    constants = normalisation.image_gradient_constants(None, 3)
    with torch.inference_mode():
        table = normalisation.constants_on_device(constants, DEVICE)
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    assert not table.is_inference() and not table.requires_grad


def test_tables_do_not_pile_up() -> None:
    from fastvit.kernels import normalisation
    from fastvit.kernels.normalisation import constants_on_device, image_gradient_constants

    for number in range(2 * normalisation.KEPT):
        table = constants_on_device(image_gradient_constants([1.0 + number], 1), DEVICE)
        assert float(table[3, 0]) == pytest.approx(1 / (1 + number))
    assert len(normalisation._tables) == normalisation.KEPT
