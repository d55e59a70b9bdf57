"""Launch and rendezvous: plain python, torchrun and srun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from prcl_fast import __version__
from prcl_fast.errors import InputError
from prcl_fast.processes.launch import Launch, device_of, expand_hosts, read_launch
from prcl_fast.processes.rendezvous import _Rendezvous
from support.paths import CONFIGS
from support.processes import free_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-005,7]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "0",
    "SLURM_NODELIST": "gpu[1-7]",
}


def launch(**changes: object) -> Launch:
    values = {
        "rank": 1,
        "world": 8,
        "local_rank": 1,
        "local_world": 4,
        "address": "a",
        "port": 1,
        "by": "torchrun",
    }
    return Launch(**(values | changes))  # type: ignore[arg-type]


def test_the_environment_of_torchrun_gives_the_whole_launch() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "gpu1", 29500, "torchrun")


def test_the_environment_of_srun_gives_the_whole_launch() -> None:
    assert read_launch(SRUN) == Launch(5, 7, 1, 3, "gpu003", 20000 + (7919 * 1234 + 2) % 10000, "slurm")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"},
        BATCH_SCRIPT,
        BATCH_SCRIPT | {"WORLD_SIZE": "7"},
        BATCH_SCRIPT | {"SLURM_STEP_ID": str(2**32 - 6)},  # the shell of salloc
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_has_no_launch(environ: dict[str, str]) -> None:
    assert read_launch(environ) is None


def test_inside_srun_torchrun_is_the_launcher() -> None:
    assert read_launch(SRUN | TORCHRUN) == read_launch(TORCHRUN)


def test_a_given_address_overrides_that_of_slurm() -> None:
    found = read_launch(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert found is not None
    assert (found.address, found.port) == ("10.0.0.1", 1234)


def test_ports_of_steps_that_run_together_differ() -> None:
    ports = set()
    for job in range(100, 110):
        for step in range(10):
            found = read_launch(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            assert found is not None
            ports.add(found.port)
    assert len(ports) == 100
    assert 20000 <= min(ports) <= max(ports) < 30000


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        *[({k: v for k, v in TORCHRUN.items() if k != name}, name) for name in TORCHRUN],
        *[({k: v for k, v in SRUN.items() if k != name}, name) for name in ("SLURM_PROCID", "SLURM_LOCALID")],
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NODEID"}, "SLURM_NODEID"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK: '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'"),
        (TORCHRUN | {"WORLD_SIZE": "3", "RANK": "0"}, "4 processes on this machine, but 3 in all"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT: 70000"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 7"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "SLURM_STEP_TASKS_PER_NODE: 2(x3) makes 6"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE: 'many'"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[1-"}, "SLURM_STEP_NODELIST: 'gpu[1-'"),
    ],
)
def test_a_half_set_or_contradictory_environment_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(InputError) as caught:
        read_launch(environ)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[003-005,7],cpu1", ["gpu003", "gpu004", "gpu005", "gpu7", "cpu1"]),
        ("a-[09-11].b", ["a-09.b", "a-10.b", "a-11.b"]),
        ("r[1-2]n[0,2]", ["r1n0", "r1n2", "r2n0", "r2n2"]),
    ],
)
def test_node_lists_are_expanded(nodes: str, hosts: list[str]) -> None:
    assert expand_hosts(nodes) == hosts


@pytest.mark.parametrize("nodes", ["", "gpu[1-", "gpu[a]", "gpu[1,]", ",gpu1", "gpu[3-1]", "gpu 1"])
def test_a_malformed_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(InputError, match="SLURM_STEP_NODELIST"):
        expand_hosts(nodes)


def cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_local_process_takes_a_device_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 4)
    assert device_of(launch(local_rank=3), name) == torch.device("cuda", 3)
    assert device_of(None, name) == torch.device("cuda", 0)  # PyTorch takes no device without its index


def test_a_task_to_which_slurm_bound_a_gpu_takes_the_visible_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 1)
    assert device_of(launch(local_rank=3, by="slurm"), "cuda") == torch.device("cuda", 0)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, by in ((1, "torchrun"), (2, "torchrun"), (2, "slurm")):
        cuda(monkeypatch, count)
        with pytest.raises(InputError, match=f"4 processes on this machine.* {count} CUDA devices"):
            device_of(launch(by=by), "auto")


def test_one_named_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 4)
    with pytest.raises(InputError, match="cuda:1"):
        device_of(launch(), "cuda:1")
    assert device_of(launch(local_rank=0, local_world=1), "cuda:1") == torch.device("cuda", 1)


def test_without_cuda_all_processes_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 0)
    assert device_of(launch(), "auto") == device_of(launch(), "cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="0 CUDA devices"):
        device_of(launch(), "cuda")


# Runs NAME=ADDRESS=PORT=WORLD=RANKS, all at the same time; each rank joins and sums a one.
SCRIPT = """
import os, sys
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
import torch
from prcl_fast.processes import rendezvous
from prcl_fast.processes.launch import Launch
from prcl_fast.errors import InputError, RunError


def work(name, address, port, world, rank, wait_s):
    here = Launch(rank, world, rank, world, address, port, "torchrun")
    device = torch.device("cpu")
    if name == "wrong_input" and rank > 0:
        device = InputError(f"data.root: the input error of rank {rank}")
    if name == "versions" and rank > 0:
        former = rendezvous.arrival
        rendezvous.arrival = lambda *a: with_fact(former(*a), "PyTorch", "1.0")
    if name == "strange" and rank > 0:
        rendezvous.arrival = lambda *a: Strange()
    if name in GPUS:
        former = rendezvous.arrival
        rendezvous.arrival = lambda *a: former(*a)._replace(device=GPUS[name][rank])
    command = f"train {rank}" if name == "commands" else "train"
    rendezvous._ANSWER_S = 2.0 if name == "taken" else 30.0
    with rendezvous.join(here, device, 20.0, command=command, wait_s=wait_s) as group:
        ones = torch.ones(1)
        torch.distributed.all_reduce(ones)
        assert ones.item() == world
        group.store.set("written", "1")


def with_fact(arrival, key, value):
    return arrival._replace(facts=arrival.facts | {key: value})


class Strange:
    def to_text(self):
        return "cpu"


GPUS = {"mixed": ["cpu", "GPU a of there"], "shared": ["GPU a of here", "GPU a of here"]}
folder, *runs = sys.argv[1:]
children = {}
for run in runs:
    name, address, port, world, *ranks = run.split("=")
    for rank in ranks:
        child = os.fork()
        if not child:
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            status = 0
            try:
                fails = name in ("missing", "headless", "taken", "unknown", "twice")
                work(name, address, int(port), int(world), int(rank), 2.0 if fails else 30.0)
            except (InputError, RunError) as error:
                print(error, file=sys.stderr, flush=True)
                status = 2 if isinstance(error, InputError) else 3
            except SystemExit as error:
                status = error.code
            os._exit(status)
        children[child] = name
for _ in range(len(children)):
    child, status = os.wait()
    print(children[child], os.waitstatus_to_exitcode(status))
"""


@dataclass
class Outcome:
    """Exit statuses of the ranks of a rendezvous, and their standard error."""

    port: int
    statuses: list[int]
    errors: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("outcomes")
    runs = {
        "all": ("127.0.0.1", "2=0=1"),
        "missing": ("127.0.0.1", "3=0=2"),
        "headless": ("127.0.0.1", "2=1"),
        "taken": ("127.0.0.1", "2=0=1"),
        "unknown": ("no such host", "2=0"),
        "wrong_input": ("127.0.0.1", "3=0=1=2"),
        "mixed": ("127.0.0.1", "2=0=1"),
        "shared": ("127.0.0.1", "2=0=1"),
        "commands": ("127.0.0.1", "2=0=1"),
        "versions": ("127.0.0.1", "3=0=1=2"),
        "strange": ("127.0.0.1", "2=0=1"),
        "twice": ("127.0.0.1", "3=0=1=1"),
    }
    with socket.create_server(("", 0)) as taken:
        ports = {name: free_port() for name in runs} | {"taken": taken.getsockname()[1]}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)]
            + [f"{name}={address}={ports[name]}={ranks}" for name, (address, ranks) in runs.items()],
            capture_output=True,
            text=True,
            timeout=90,
            env={k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")},
        )
    assert not process.stderr
    outcomes = {name: Outcome(ports[name], [], (folder / name).read_text()) for name in runs}
    for line in process.stdout.splitlines():
        name, status = line.split()
        outcomes[name].statuses.append(int(status))
    return outcomes


def test_all_ranks_join_and_leave_the_group(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["all"]
    assert (outcome.statuses, outcome.errors) == ([0, 0], "")


def test_a_missing_rank_is_named_by_one_other_rank(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["missing"]
    place = f"rendezvous at 127.0.0.1:{outcome.port}"
    assert outcome.errors == f"{place}: 2 of 3 processes arrived within 2 s; missing: rank 1\n"
    assert sorted(outcome.statuses) == [1, 3]


def test_an_input_error_of_some_ranks_is_printed_by_one_and_ends_all(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["wrong_input"]
    assert outcome.errors == "data.root: the input error of rank 1\n"
    assert outcome.statuses == [2, 2, 2]


def test_ranks_on_different_kinds_of_device_or_on_the_same_gpu_are_refused(
    outcomes: dict[str, Outcome],
) -> None:
    for name, line in (
        ("mixed", "rank 0 computes on the CPU, but rank 1 on GPU a of there"),
        ("shared", "ranks 0 and 1 share GPU a of here; give each its own"),
    ):
        outcome = outcomes[name]
        assert outcome.errors == f"rendezvous at 127.0.0.1:{outcome.port}: {line}\n"
        assert sorted(outcome.statuses) == [1, 3]


def test_without_rank_0_the_message_names_its_address(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["headless"]
    place = f"rendezvous at 127.0.0.1:{outcome.port}"
    assert outcome.errors.startswith(f"{place}: rank 1 of 2 found nobody there within 2 s: ")
    assert (outcome.errors.count("\n"), outcome.statuses) == (1, [3])


def test_a_port_taken_by_a_server_that_answers_nothing_is_one_line_of_each_rank(
    outcomes: dict[str, Outcome],
) -> None:
    outcome = outcomes["taken"]
    place = f"rendezvous at 127.0.0.1:{outcome.port}"
    assert sorted(outcome.errors.splitlines()) == [
        f"{place}: rank 1 found a server there that is not rank 0's (no answer within 2 s); MASTER_PORT sets "
        "another port",
        f"{place}: the port is taken; MASTER_PORT sets another port",
    ]
    assert outcome.statuses == [3, 3]


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("commands", "process 1 has command train 1, process 0 has train 0"),
        ("versions", f"process 1 has PyTorch 1.0, process 0 has {torch.__version__}"),
        ("strange", f"process 1 has prcl_fast of another version, process 0 has {__version__}"),
    ],
)
def test_ranks_that_differ_in_command_or_versions_are_refused_on_each(
    name: str, difference: str, outcomes: dict[str, Outcome]
) -> None:
    lines = outcomes[name].errors.splitlines()
    assert set(lines) == {f"{difference}; it must be the same in all processes of a run"}
    assert outcomes[name].statuses == [2] * len(lines)
    assert len(lines) >= 2


def test_a_second_process_of_the_same_rank_is_refused(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["twice"]
    place = f"rendezvous at 127.0.0.1:{outcome.port}"
    assert f"{place}: another process is rank 1 there; MASTER_PORT sets another port\n" in outcome.errors


def test_the_store_of_a_run_on_one_machine_listens_on_the_loopback_address_alone() -> None:
    for address, world, bound in (("127.0.0.1", 2, "127.0.0.1"), ("127.0.0.1", 4, "0.0.0.0")):
        here = Launch(0, world, 0, 2, address, free_port(), "torchrun")
        with _Rendezvous(here, 1.0)._listen() as listener:
            assert listener.getsockname()[0] == bound


def test_an_unknown_address_is_one_line(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["unknown"]
    assert "unknown address" in outcome.errors
    assert (outcome.errors.count("\n"), outcome.statuses) == (1, [3])


def test_the_example_for_slurm_is_valid_bash() -> None:
    (script,) = (CONFIGS / "slurm").iterdir()
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) < 50
