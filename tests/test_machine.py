"""The device, its precision, and whether a person is watching."""

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from brats_helpers import machine


@pytest.mark.parametrize(
    "name, message",
    [
        ("mps", "device 'mps': Apple's GPUs are not supported; expected auto, cpu, cuda or cuda:0"),
        ("mps:0", "Apple's GPUs are not supported"),
        ("gpu", "device 'gpu': expected auto, cpu, cuda or cuda:0"),
        ("meta", "device 'meta': expected"),
        ("cuda:99", "device 'cuda:99' does not compute here"),
    ],
)
def test_a_device_that_does_not_work_is_refused_by_name(name, message):
    with pytest.raises(RuntimeError, match=message):
        machine.choose_device(name)


def test_a_device_that_works_is_taken():
    assert machine.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "flags, precision",
    [("fpu avx2", "no"), ("fpu avx512f avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), (None, "no")],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(tmp_path, monkeypatch, flags, precision):
    info = tmp_path / "cpuinfo"
    if flags:
        info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    found = machine._cpu_flags(info)
    monkeypatch.setattr(machine, "_cpu_flags", lambda: found)
    assert machine.choose_precision(torch.device("cpu")) == precision


def test_a_front_end_that_could_ask_for_input_counts_as_a_person():
    """The public method that tells it may change with ipykernel; this fails then."""
    manager, client = start_new_kernel()
    try:
        for asks in (True, False):
            said = []
            client.execute_interactive(
                "from brats_helpers import log; print(log.watched())",
                allow_stdin=asks,
                timeout=60,
                output_hook=lambda message, said=said: said.append(message["content"].get("text", "")),
            )
            assert "".join(said) == f"{asks}\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
