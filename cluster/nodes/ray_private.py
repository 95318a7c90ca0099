"""The private names of Ray that this package uses, all of them (Ray 2.60), as functions with stable signatures.

Ray has no public call for any of this. `tests/unit/cluster/nodes/test_ray_private.py` touches every name, so an upgrade
of Ray that removes one fails there. Ray is imported inside the functions: `glann --help` must not import it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from ray.job_config import JobConfig
    from ray.job_submission import JobSubmissionClient
    from ray.util.placement_group import PlacementGroup

# Actor that Ray Train keeps on the driver's node after the run; a node that has only this one never becomes idle.
COORDINATOR_ACTOR = "_AutoscalingCoordinatorActor"
DRIVER_LOGGERS = {
    "ray.dashboard.modules.dashboard_sdk": logging.WARNING,
    "ray.dashboard.modules.job.sdk": logging.WARNING,
    "ray._private.runtime_env.packaging": logging.WARNING,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}
CALL_TIMEOUT_S = 10.0
DIRECT = (("grpc.enable_http_proxy", 0),)  # as Ray's own calls, whatever http_proxy says
HEAD_TIMEOUT_S = 30.0  # a head that is busy is not refused

Client = TypeVar("Client", bound="JobSubmissionClient")


class ActorProcess(NamedTuple):
    """A living actor: name of its class and process id."""

    class_name: str
    pid: int


class Refusal(NamedTuple):
    """Why a call was refused; `token`: for the token that it carried, or for lack of one."""

    token: bool
    reason: str


# Nodes ---------------------------------------------------------------------------------------


def draining_nodes() -> dict[str, int]:
    """Deadlines of nodes with a drain notice, by node id: milliseconds since 1970, 0 if unknown."""
    from ray._private.state import state

    return state.get_draining_nodes()


def abandoned_reservations() -> list[PlacementGroup]:
    """Placement groups of this job whose creator was an actor that has ended.

    Ray keeps them until the job ends, and Ray Train removes those of a group of workers only if it has started.
    """
    from ray import ActorID, PlacementGroupID, get_runtime_context
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup

    kind = cast(Any, gcs_pb2).PlacementGroupTableData
    job = bytes.fromhex(get_runtime_context().get_job_id())
    rows = [kind.FromString(row) for row in state._connect_and_get_accessor().get_placement_group_table()]
    return [
        PlacementGroup(PlacementGroupID(row.placement_group_id))
        for row in rows
        if row.creator_job_id == job
        and row.creator_actor_dead  # Ray says so of the driver too, which is no actor
        and row.creator_actor_id not in (b"", ActorID.nil().binary())
        and not row.is_detached
        and row.state != kind.PlacementGroupState.Value("REMOVED")
    ]


def request_drain(head: str, node: str, message: str, deadline_s: float) -> tuple[bool, str]:
    """Mark a node as preempted from `deadline_s` (seconds since 1970) on.

    Does what `ray drain-node` does, without waiting for the node's end.

    Returns:
        Whether the head accepts, and its reason if not.
    """
    from ray.core.generated import autoscaler_pb2

    reason = cast(Any, autoscaler_pb2).DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    return _gcs_client(head).drain_node(node, reason, message, int(1000 * deadline_s), timeout=CALL_TIMEOUT_S)


def is_node_alive(head: str, node: str) -> bool:
    """Whether the head counts the node among the living."""
    from ray import NodeID

    return _gcs_client(head).check_alive([NodeID.from_hex(node)], timeout=CALL_TIMEOUT_S)[0]


def actors_on_node(head: str, node: str) -> list[ActorProcess]:
    """The living actors of a node."""
    from ray import _raylet
    from ray._private.state import GlobalState

    options = cast(Any, _raylet).GcsClientOptions
    state = GlobalState()
    state._initialize_global_state(options.create(head, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
    actors = state.actor_table(None, None, "ALIVE").values()
    return [
        ActorProcess(actor["ActorClassName"], actor["Pid"]) for actor in actors if actor["Address"]["NodeID"] == node
    ]


def _gcs_client(head: str) -> Any:
    from ray import _raylet

    return cast(Any, _raylet).GcsClient(address=head)


def find_head() -> str | None:
    """Address of the head that `ray start` started or joined on this machine, running or not; None if there is none."""
    from ray._private.services import get_ray_address_from_environment

    try:
        return get_ray_address_from_environment("auto", None)
    except ConnectionError:
        return None


def head_refusal(head: str) -> Refusal | None:
    """Why what listens at `host:port` does not answer as a Ray head does to this process; None if it does."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(head, DIRECT) as channel:
            _call_head(channel, HEAD_TIMEOUT_S)
    except AuthenticationError:
        return Refusal(token=True, reason="there is none")
    except grpc.RpcError as error:
        denied = error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        return Refusal(token=denied, reason=" ".join(str(error.details()).replace(";", ",").split())[:160])
    return None


def answers_without_token(head: str) -> bool:
    """Whether the head at `host:port` answers a call that carries no token."""
    import grpc

    try:
        with grpc.insecure_channel(head, DIRECT) as channel:
            _call_head(channel, CALL_TIMEOUT_S)
    except grpc.RpcError:
        return False
    return True


def _call_head(channel: Any, timeout_s: float) -> None:
    """Make the cheapest call that every head answers. Raises grpc.RpcError."""
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    stub = cast(Any, services).NodeInfoGcsServiceStub(channel)
    stub.CheckAlive(cast(Any, messages).CheckAliveRequest(), timeout=timeout_s)


# The driver's process ------------------------------------------------------------------------


def isolated_job() -> JobConfig:
    """Configuration for `ray.init` whose workers do not import from the folders of this process.

    Otherwise Ray puts the working folder and the folder of the script in front of the standard library on the path of
    every worker, so that a `profile.py` in them is imported instead of Python's.
    """
    from ray.job_config import JobConfig

    class Isolated(JobConfig):
        """Has Ray believe in a working folder of its own, for which it leaves the path as it is."""

        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return Isolated()


def session_folder() -> tuple[Path, int]:
    """Where a local Ray of this process puts the folder of its session, and by how many characters that is too long.

    The path of a socket has a limit, 107 bytes on Linux.
    """
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.utils import validate_socket_filepath

    folder = Path(get_default_ray_temp_dir())
    socket = folder / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "plasma_store"
    too_long = 0
    while True:
        try:
            validate_socket_filepath(str(socket)[too_long:])
        except OSError:
            too_long += 1
        else:
            return folder, too_long


def set_process_title(title: str) -> None:
    """Replace the command line of this process as `ps` shows it."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(title)


def hide_worker_output(hidden: Callable[[str], bool]) -> None:
    """Drop output of workers and of the raylet in which a line is `hidden`, instead of printing it in this process."""
    from ray._private import worker

    show = worker.print_to_stdstream

    def filtered(data: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        if not any(hidden(line) for line in data.get("lines", ())):
            show(data, *arguments, **options)

    worker.print_to_stdstream = filtered


# The job server ------------------------------------------------------------------------------


def enable_token_auth() -> None:
    """Send this machine's token with every request, if it has one."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def quiet_job_client() -> None:
    """Silence the loggers that report each upload and each use of the token."""
    import ray.job_submission  # noqa: F401 - its modules set levels of their own when imported

    for name, level in DRIVER_LOGGERS.items():
        logging.getLogger(name).setLevel(level)


def with_timeout(client: type[Client], connect_s: float, answer_s: float) -> type[Client]:
    """The same job client with a bound on how long a request may take; Ray's own has none."""
    unbounded = cast(Any, client)._do_request

    def request(self: Client, method: str, endpoint: str, **options: Any) -> Any:
        return unbounded(self, method, endpoint, timeout=(connect_s, answer_s), **options)

    return cast(type[Client], type(client.__name__, (client,), {"_do_request": request}))


def server_version(client: JobSubmissionClient) -> str:
    """Ray's version on the cluster, as the client learned it when it connected; empty if unknown."""
    return client._server_ray_version or ""


# The job of this process ---------------------------------------------------------------------


def submitted_job() -> str | None:
    """Id of the submitted job that this process is the driver of; None if it was not submitted."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY

    config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return (config.get("metadata") or {}).get(JOB_ID_METADATA_KEY)


def update_job_metadata(head: str, job: str, changes: Mapping[str, str]) -> bool:
    """Change the metadata of a running job, which the dashboard shows; False if it does not run.

    Ray takes metadata at submission only, so its record is written anew. Only the job's own driver may do this: the
    head writes the record before the driver starts and after it has ended, and nobody else does meanwhile.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.dashboard.modules.job.common import JobInfoStorageClient, JobStatus

    gcs, key = _gcs_client(head), JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
    held = gcs.internal_kv_get(key, namespace=KV_NAMESPACE_JOB, timeout=CALL_TIMEOUT_S)
    record = json.loads(held) if held else {}
    if record.get("status") != JobStatus.RUNNING.value:
        return False
    record["metadata"] = {**(record.get("metadata") or {}), **changes}
    gcs.internal_kv_put(key, json.dumps(record).encode(), True, namespace=KV_NAMESPACE_JOB, timeout=CALL_TIMEOUT_S)
    return True
