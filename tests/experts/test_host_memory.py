"""Free memory as a container sees it."""

from types import SimpleNamespace

import pytest

from vllm_balance.experts import host_memory


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))


def cgroup(folder, names, limit, usage, stat):
    for name, text in zip(names, (limit, usage, stat), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("version", [0, 1])
def test_a_limit_counts_and_caches_do_not(tmp_path, version):
    *names, prefix = host_memory._FILES[version]
    stat = f"{prefix}active_file 30\n{prefix}inactive_file 50\nanon 9\n"
    assert host_memory.available_bytes(cgroup(tmp_path, names, "600", "500", stat)) == 180
    assert host_memory.available_bytes(cgroup(tmp_path, names, "9000", "500", stat)) == 1000
    assert host_memory.available_bytes(cgroup(tmp_path, names, "100", "500", stat)) == 0


def test_without_a_limit_the_machine_decides(tmp_path):
    assert host_memory.available_bytes(tmp_path) == 1000
    *names, _ = host_memory._FILES[0]
    assert host_memory.available_bytes(cgroup(tmp_path, names, "max", "500", "")) == 1000
