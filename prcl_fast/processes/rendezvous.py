"""The rendezvous: all ranks of a run find each other and form a process group."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.agreement import DifferenceError, first_difference
from prcl_fast.processes.arrival import Arrival, arrival, misplaced
from prcl_fast.processes.failures import first_line
from prcl_fast.processes.launch import Launch

# A server that answers no request of PyTorch's store for so long is another program's.
_ANSWER_S = 10.0


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
    device: torch.device | Exception,
    timeout_s: float,
    *,
    command: str = "",
    wait_s: float = 300.0,
    captures: bool = False,
) -> Group:
    """Waits for all ranks of the run and makes them PyTorch's process group.

    Args:
        device: of this rank: NCCL carries CUDA tensors, gloo tensors on the CPU. Or the error for which this
            rank, and so the run, cannot begin.
        timeout_s: a collective raises after this time if a rank is missing.
        command: its name, which must be equal on all ranks.
        wait_s: how long to wait for the ranks to arrive.
        captures: CUDA graphs will hold collectives. If one of them fails or takes too long, NCCL's own thread
            then ends no process; the watchdog does.

    Raises:
        DifferenceError: on every rank: the ranks have another command, world size or version of the program,
            Python, PyTorch or NumPy.
        Exception: the error of some rank; one rank raises it, the others SystemExit, with status 2 for an
            InputError, else with 1.
        RunError: the ranks did not all arrive. Where they can agree on it, one rank raises this, the others
            SystemExit(1).
    """
    rendezvous = _Rendezvous(launch, wait_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = rendezvous.open_store()
        here = rendezvous.await_ranks(store, device, command)
        if captures:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # PyTorch's notes on CUDA graphs ask for it
        dist.init_process_group(
            "gloo" if here.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=here if here.type == "cuda" else None,
        )
    except (InputError, RunError):
        raise
    except (RuntimeError, ValueError) as error:
        if error is device:
            raise
        raise RunError(f"{rendezvous.place}: rank {launch.rank}: {first_line(error)}") from None
    return Group(dist.PrefixStore("watchdog", store))


class _Rendezvous:
    """The wait for all ranks, at most `wait_s` seconds from now.

    Sockets are tried here before PyTorch's store opens its own, because errors of its C++ code are long.
    """

    def __init__(self, launch: Launch, wait_s: float) -> None:
        self.launch, self.wait_s = launch, wait_s
        self.place = f"rendezvous at {launch.address}:{launch.port}"
        self._deadline = time.monotonic() + wait_s
        # torchrun hosts a store for its processes; otherwise rank 0 does.
        self._hosting = launch.rank == 0 and not _by_torchrun()

    def open_store(self) -> dist.Store:
        """The store of all ranks; on rank 0, where needed, with the server that holds it."""
        listener = self._listen() if self._hosting else None
        self._await_server()
        server = self._connected(
            lambda: dist.TCPStore(
                self.launch.address,
                self.launch.port,
                is_master=self._hosting,
                timeout=timedelta(seconds=self.wait_s),
                wait_for_workers=False,
                master_listen_fd=listener.detach() if listener else None,
            )
        )
        # The store of torchrun outlives a restart of the processes.
        return dist.PrefixStore(f"prcl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)

    def await_ranks(self, store: dist.Store, device: torch.device | Exception, command: str) -> torch.device:
        """The device, once every rank has arrived with one of the same kind, and no two with the same GPU."""
        world, own = self.launch.world, self.launch.rank
        keys = [f"arrived/{rank}" for rank in range(world)]
        if not _by_torchrun() and store.add(f"arrivals/{own}", 1) > 1:
            raise RunError(
                f"{self.place}: another process is rank {own} there; MASTER_PORT sets another port"
            )
        store.set(keys[own], arrival(self.launch, device, command).to_text())
        count, pause = store.add("count", 1), 0.01
        while count < world:
            if store.check(["failed"]):
                self._end_as(store)
            if time.monotonic() > self._deadline:
                missing = [str(rank) for rank in range(world) if not store.check([keys[rank]])]
                self._give_up(
                    store,
                    f"{self.place}: {world - len(missing)} of {world} processes arrived within "
                    f"{self.wait_s:g} s; missing: rank {', '.join(missing)}",
                )
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
            count = store.add("count", 0)
        arrived = [Arrival.from_text(text) for text in store.multi_get(keys)]
        difference = first_difference([other.facts for other in arrived])
        if difference:
            self._give_up(store, difference, everywhere=True)
        failed = [rank for rank, other in enumerate(arrived) if other.status]
        if failed:
            if isinstance(device, Exception) and failed[0] == own:
                self._end(device)
            self._end(SystemExit(arrived[failed[0]].status))
        reason = misplaced([other.device for other in arrived])
        if reason:
            self._give_up(store, f"{self.place}: {reason}")
        assert isinstance(device, torch.device)
        return device

    def _give_up(self, store: dist.Store, message: str, *, everywhere: bool = False) -> NoReturn:
        """Ends all ranks with the message of the first one that gives up.

        Args:
            everywhere: it is a difference of the ranks, and each of them raises it.
        """
        store.compare_set("failed", "", json.dumps([self.launch.rank, message, everywhere]))
        self._end_as(store)

    def _end_as(self, store: dist.Store) -> NoReturn:
        """Ends this process as the first rank that gave up has decided."""
        try:
            rank, message, everywhere = json.loads(store.get("failed"))
        except (ValueError, TypeError):
            raise RunError(
                f"{self.place}: another program writes there; MASTER_PORT sets another port"
            ) from None
        if everywhere:
            self._end(DifferenceError(message))
        self._end(RunError(message) if rank == self.launch.rank else SystemExit(1))

    def _end(self, error: Exception | SystemExit) -> NoReturn:
        """Raises the error."""
        if self._hosting:
            time.sleep(2.0)  # for the other ranks to read the store, which ends with rank 0
        raise error

    def _listen(self) -> socket.socket:
        launch = self.launch
        try:
            found = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
            # PyTorch looks up the name of every peer; that of an IPv4 address in IPv6 form can take seconds.
            entry = min(found, key=lambda entry: (socket.AF_INET, socket.AF_INET6).index(entry[0]))
            host = str(entry[4][0])
            # On other machines the same name may lead to an address of the network.
            alone = launch.world == launch.local_world and ipaddress.ip_address(host).is_loopback
            return socket.create_server((host if alone else "", launch.port), family=entry[0], backlog=2048)
        except socket.gaierror as error:
            raise RunError(f"{self.place}: unknown address: {error.strerror}") from None
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "the port is taken" if taken else f"rank 0 cannot listen there: {error.strerror}"
            raise RunError(f"{self.place}: {reason}; MASTER_PORT sets another port") from None

    def _connected(self, connect: Callable[[], dist.Store]) -> dist.Store:
        """The result of `connect`, which waits without a limit for the answer of a server."""
        result: list[dist.Store] = []
        errors: list[Exception] = []

        def call() -> None:
            try:
                result.append(connect())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=call, name="rendezvous", daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
        if errors:
            raise errors[0]
        if not result:
            raise RunError(
                f"{self.place}: rank {self.launch.rank} found a server there that is not rank 0's (no answer "
                f"within {_ANSWER_S:g} s); MASTER_PORT sets another port"
            )
        return result[0]

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


def _by_torchrun() -> bool:
    """Whether torchrun hosts the store: it gives each rank once, and its store outlives restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
