"""The rendezvous: all ranks of a run find each other and form a process group."""

from __future__ import annotations

import errno
import os
import socket
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.launch import Launch

# What a rank announces when it arrives: this, or the name of its GPU.
_CPU, _INPUT_ERROR = "cpu", "input error"


class Group:
    """The process group of a run: a context manager that leaves it at its end.

    Attributes:
        store: for the watchdog, apart from the keys of PyTorch.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def leave(self) -> None:
        """Leaves the process group. Every rank must call it, with no collective in progress."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:  # after an error other ranks may be gone, and leaving could wait for ever
            self.leave()


def join(
    launch: Launch,
    device: torch.device | InputError,
    timeout_s: float,
    *,
    wait_s: float = 300.0,
    captures: bool = False,
) -> Group:
    """Waits for all ranks of the run and makes them PyTorch's process group.

    Args:
        device: of this rank: NCCL carries CUDA tensors, gloo tensors on the CPU. Or the input error for which
            this rank, and so the run, cannot begin.
        timeout_s: a collective raises after this time if a rank is missing.
        wait_s: how long to wait for the ranks to arrive.
        captures: CUDA graphs will hold collectives. If one of them fails or takes too long, NCCL's own thread
            then ends no process; the watchdog does.

    Raises:
        InputError: the input error of some rank; one rank raises it, the others SystemExit(1).
        RunError: the ranks did not all arrive. Where they can agree on it, one rank raises this, the others
            SystemExit(1).
    """
    rendezvous = _Rendezvous(launch, wait_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = rendezvous.open_store()
        device = rendezvous.await_ranks(store, device)
        if captures:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # PyTorch's notes on CUDA graphs ask for it
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (InputError, RunError):
        raise
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{rendezvous.place}: rank {launch.rank}: {first_line(error)}") from None
    return Group(dist.PrefixStore("watchdog", store))


def first_line(error: BaseException) -> str:
    """The message of an error without the C++ stack that PyTorch adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Rendezvous:
    """The wait for all ranks, at most `wait_s` seconds from now.

    Sockets are tried here before PyTorch's store opens its own, because errors of its C++ code are long.
    """

    def __init__(self, launch: Launch, wait_s: float) -> None:
        self.launch, self.wait_s = launch, wait_s
        self.place = f"rendezvous at {launch.address}:{launch.port}"
        self._deadline = time.monotonic() + wait_s
        # torchrun hosts a store for its processes; otherwise rank 0 does.
        self._hosting = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def open_store(self) -> dist.Store:
        """The store of all ranks; on rank 0, where needed, with the server that holds it."""
        listener = self._listen() if self._hosting else None
        self._await_server()
        server = dist.TCPStore(
            self.launch.address,
            self.launch.port,
            is_master=self._hosting,
            timeout=timedelta(seconds=self.wait_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
        # The store of torchrun outlives a restart of the processes.
        return dist.PrefixStore(f"prcl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)

    def await_ranks(self, store: dist.Store, device: torch.device | InputError) -> torch.device:
        """The device, once every rank has arrived with one of the same kind, and no two with the same GPU."""
        world, own = self.launch.world, self.launch.rank
        keys = [f"arrived/{rank}" for rank in range(world)]
        store.set(keys[own], _announcement(device))
        count, pause = store.add("count", 1), 0.01
        while count < world:
            if time.monotonic() > self._deadline or store.check(["failed"]):
                missing = [str(rank) for rank in range(world) if not store.check([keys[rank]])]
                self._give_up(
                    store,
                    f"{world - len(missing)} of {world} processes arrived within {self.wait_s:g} s; "
                    f"missing: rank {', '.join(missing)}",
                )
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
            count = store.add("count", 0)
        names = [name.decode() for name in store.multi_get(keys)]
        if isinstance(device, InputError) or _INPUT_ERROR in names:
            self._end(device if isinstance(device, InputError) and names.index(_INPUT_ERROR) == own else None)
        if _CPU in names and len(set(names)) > 1:
            cpu, gpu = names.index(_CPU), next(rank for rank in range(world) if names[rank] != _CPU)
            self._give_up(store, f"rank {cpu} computes on the CPU, but rank {gpu} on {names[gpu]}")
        for rank, name in enumerate(names):
            owner = names.index(name)
            if name != _CPU and owner != rank:
                self._give_up(store, f"ranks {owner} and {rank} share {name}; give each its own")
        return device

    def _give_up(self, store: dist.Store, message: str) -> NoReturn:
        own = str(self.launch.rank)
        is_first = store.compare_set("failed", "", own).decode() == own
        self._end(RunError(f"{self.place}: {message}") if is_first else None)

    def _end(self, error: Exception | None) -> NoReturn:
        """Raises the error, or ends this process silently where another rank raises it."""
        if self._hosting:
            time.sleep(2.0)  # for the other ranks to read the store, which ends with rank 0
        raise SystemExit(1) if error is None else error

    def _listen(self) -> socket.socket:
        try:
            found = socket.getaddrinfo(self.launch.address, self.launch.port, type=socket.SOCK_STREAM)
            # PyTorch looks up the name of every peer; that of an IPv4 address in IPv6 form can take seconds.
            family = min((entry[0] for entry in found), key=(socket.AF_INET, socket.AF_INET6).index)
            return socket.create_server(("", self.launch.port), family=family, backlog=2048)
        except socket.gaierror as error:
            raise RunError(f"{self.place}: unknown address: {error.strerror}") from None
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "the port is taken" if taken else f"rank 0 cannot listen there: {error.strerror}"
            raise RunError(f"{self.place}: {reason}; MASTER_PORT sets another port") from None

    def _await_server(self) -> None:
        launch = self.launch
        while True:
            try:
                socket.create_connection((launch.address, launch.port), timeout=5.0).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                    raise RunError(f"{self.place}: unknown address: {reason}") from None
            if self._hosting:
                host = socket.gethostname()
                raise RunError(f"{self.place}: does not lead to rank 0, which is on {host}: {reason}")
            if time.monotonic() > self._deadline:
                raise RunError(
                    f"{self.place}: rank {launch.rank} of {launch.world} found nobody there within "
                    f"{self.wait_s:g} s: {reason}; rank 0 listens there once it has started"
                )
            time.sleep(0.2)


def _announcement(device: torch.device | InputError) -> str:
    if isinstance(device, InputError):
        return _INPUT_ERROR
    if device.type == "cpu":
        return _CPU
    return f"GPU {torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}"
