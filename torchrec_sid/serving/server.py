"""`serve_folder`: a served folder behind the Open Inference Protocol, REST and gRPC.

The protocol is KServe's library; ours are what a request means, micro-batches, limits, and exchanging the
model while it answers. The environment needs neither TorchRec nor TorchX (``requirements-serve.txt``).

An inference request has the input ``candidates`` ``[n]``, optionally ``history``, ``history_action`` and
``history_ts`` ``[m]`` and ``ts`` ``[1]`` (INT64), every dense feature by its name, ``[1]`` or ``[n]``
(FP32), and features of the log's specification by theirs. The answer has ``candidates`` and ``scores``, in
the order asked for, and the parameter ``unknown_history``.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from grpc_interceptor.exceptions import DeadlineExceeded, ResourceExhausted
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

from torchrec_sid.errors import SidError
from torchrec_sid.serving.batching import MicroBatcher, Overloaded, ServerConfig
from torchrec_sid.serving.ranker import Ranked, Ranker, RankRequest
from torchrec_sid.serving.served_features import is_number

Array = np.ndarray[Any, Any]
logger = logging.getLogger(__name__)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class _Metrics:
    """What a scraper reads; one set per process, as the Prometheus client has it."""

    requests = Counter("sid_requests", "Requests by how they ended.", ["status"])
    seconds = Histogram("sid_request_seconds", "From arrival to answer.", buckets=_SECONDS)
    candidates = Histogram(
        "sid_candidates", "Of one request.", buckets=(1, 10, 50, 100, 200, 500, 1000, 5000)
    )
    batch = Histogram(
        "sid_batch_requests", "Requests of one run of the model.", buckets=(1, 2, 4, 8, 16, 32, 64)
    )
    queued = Gauge("sid_queued_candidates", "Candidates that wait.")
    unknown = Counter("sid_unknown_history_events", "Events left out: their items are not in the model.")
    swaps = Counter("sid_swaps", "New versions by whether they were taken up.", ["status"])


class RankingModel(Model):
    """The served folder as a model of KServe's data plane."""

    def __init__(self, config: ServerConfig, ranker: Ranker) -> None:
        super().__init__(config.name)
        self.config, self.ranker = config, ranker
        self.batcher: MicroBatcher[RankRequest, Ranked] = MicroBatcher(
            self._run, lambda request: len(request.candidates), config.limits
        )
        self.ready = True

    async def __call__(
        self, body: Any, headers: dict[str, str] | None = None, verb: Any = None
    ) -> tuple[InferResponse, dict[str, str]]:
        """Answer one request of either protocol.

        Raises:
            InvalidInput: 400, INVALID_ARGUMENT. Named by input, value and remedy.
            ResourceExhausted: 429: too many candidates wait.
            DeadlineExceeded: 504: it waited too long.
        """
        with _Metrics.seconds.time():
            try:
                request = self._read(body)
                self.ranker.check(request)
                _Metrics.candidates.observe(len(request.candidates))
                ranked = await self.batcher.ask(request)
            except SidError as error:
                _Metrics.requests.labels("refused").inc()
                raise InvalidInput(str(error)) from error
            except Overloaded as error:
                _Metrics.requests.labels("overloaded").inc()
                raise ResourceExhausted(f"{error}; try again later.") from error
            except TimeoutError as error:
                _Metrics.requests.labels("timeout").inc()
                raise DeadlineExceeded(f"The request {error}.") from error
            finally:
                _Metrics.queued.set(self.batcher.queued_rows)
        _Metrics.requests.labels("ok").inc()
        _Metrics.unknown.inc(ranked.unknown_history)
        return self._answer(body, request, ranked), {}

    def get_input_types(self) -> list[dict[str, Any]]:
        """Of the model's metadata."""
        integers = [
            ("candidates", -1),
            ("history", -1),
            ("history_action", -1),
            ("history_ts", -1),
            ("ts", 1),
        ]
        inputs = [{"name": name, "datatype": "INT64", "shape": [size]} for name, size in integers]
        kinds = dict.fromkeys(self.ranker.dense_names, "FP32")
        if self.ranker.features is not None:
            asked = self.ranker.features.asked.items()
            kinds |= {name: "FP32" if is_number(feature) else "BYTES" for name, feature in asked}
        further = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in kinds.items()]
        return [*inputs, *further]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Of the model's metadata."""
        return [
            {"name": "candidates", "datatype": "INT64", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1]},
        ]

    async def follow(self) -> None:
        """Take up new versions of the folder for ever; a batch ends with the model it began with."""
        loop = asyncio.get_running_loop()
        version = Ranker.version_of(self.config.folder)
        while self.config.watch_seconds:
            await asyncio.sleep(self.config.watch_seconds)
            try:
                found = await loop.run_in_executor(None, Ranker.version_of, self.config.folder)
                if found == version:
                    continue
                self.ranker = await loop.run_in_executor(None, Ranker.load_checked, self.config.folder)
                version = found
            except (SidError, OSError) as error:
                # Between two renames there may be no folder; a bad one must not stop the good model.
                _Metrics.swaps.labels("refused").inc()
                logger.warning("%s is not taken up: %s", self.config.folder, error)
                continue
            _Metrics.swaps.labels("ok").inc()
            logger.info("serving version %s", version[:12])

    def _run(self, requests: Sequence[RankRequest]) -> list[Ranked]:
        _Metrics.batch.observe(len(requests))
        ranker = self.ranker
        for request in requests:
            ranker.check(request)  # another version may have come since it was queued
        return ranker.rank(requests)

    def _read(self, body: Any) -> RankRequest:
        if not isinstance(body, InferRequest):
            raise SidError("request", type(body).__name__, "Use the Open Inference Protocol, version 2.")
        inputs = {part.name: part for part in body.inputs}
        known = {part["name"] for part in self.get_input_types()}
        for name in inputs:
            if name not in known:
                raise SidError(f"input {name!r}", "not read by this model", f"It reads {sorted(known)}.")
        if "candidates" not in inputs:
            raise SidError("candidates", "missing", "Send the item ids to rank, INT64 [n].")
        candidates = _integers(inputs["candidates"])
        if len(candidates) > self.config.max_candidates:
            raise SidError(
                "candidates", f"{len(candidates)}", f"Send at most {self.config.max_candidates} at a time."
            )
        empty = np.empty(0, np.int64)
        history, actions, times = (
            _integers(inputs[name]) if name in inputs else empty
            for name in ("history", "history_action", "history_ts")
        )
        now = _integers(inputs["ts"]) if "ts" in inputs else np.array([-1])
        if len(now) != 1:
            raise SidError("ts", f"{len(now)} values", "Send one time per request.")
        asked = () if self.ranker.features is None else self.ranker.features.asked
        features = {name: _column(inputs[name]) for name in asked if name in inputs}
        dense = self._dense(inputs, len(candidates))
        return RankRequest(candidates, history, actions, times, int(now[0]), dense, features)

    def _dense(self, inputs: dict[str, InferInput], rows: int) -> Array:
        columns = []
        for name in self.ranker.dense_names:
            if name not in inputs:
                raise SidError(name, "missing", "Send it once per request or once per candidate, FP32.")
            values = np.asarray(inputs[name].as_numpy())
            if values.dtype != np.float32 or values.ndim != 1 or len(values) not in (1, rows):
                raise SidError(
                    name, f"{values.dtype} of shape {values.shape}", f"Send FP32 [1] or [{rows}]."
                )
            columns.append(np.broadcast_to(values, (rows,)))
        return np.stack(columns, 1) if columns else np.empty((rows, 0), np.float32)

    def _answer(self, body: InferRequest, request: RankRequest, ranked: Ranked) -> InferResponse:
        outputs = []
        for name, kind, values in (
            ("candidates", "INT64", request.candidates),
            ("scores", "FP32", ranked.scores),
        ):
            output = InferOutput(name, list(values.shape), kind)
            output.set_data_from_numpy(values, binary_data=bool(body.from_grpc or body.use_binary_outputs))
            outputs.append(output)
        return InferResponse(
            body.id or str(uuid.uuid4()),  # optional in a request; KServe's answers need one
            self.name,
            outputs,
            from_grpc=body.from_grpc,
            parameters={"unknown_history": ranked.unknown_history},
            use_binary_outputs=body.use_binary_outputs,
            requested_outputs=body.request_outputs,
        )


def serve_folder(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first.

    Raises:
        SidError: a folder that cannot be served, or that does not answer as it did where it was exported.
    """
    asyncio.run(_serve(config, Ranker.load_checked(config.folder)))


async def _serve(config: ServerConfig, ranker: Ranker) -> None:
    model = RankingModel(config, ranker)
    models = ModelRepository()
    models.update(model)
    plane = DataPlane(models)
    server = uvicorn.Server(
        uvicorn.Config(_app(plane, models), host=config.host, port=config.http_port, log_config=None)
    )
    rpc = await _start_grpc(config, plane, models) if config.grpc_port else None
    follower = asyncio.create_task(model.follow())
    logger.info("%s: %s items", config.folder, f"{len(ranker.item_ids):,}")
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal that ended it once more, which would end this process before gRPC and
        # the batches in flight are done.
        signal.signal(number, lambda *_: None)
    try:
        await server.serve()  # returns on SIGTERM and SIGINT
    finally:
        follower.cancel()
        if rpc is not None:
            await rpc.stop(grace=10)
        await model.batcher.close()


def _app(plane: DataPlane, models: ModelRepository) -> FastAPI:
    app = FastAPI(title="torchrec-sid")
    register_v2_endpoints(app, plane, ModelRepositoryExtension(models))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    for kind, status in (
        (InvalidInput, HTTPStatus.BAD_REQUEST),
        (ModelNotFound, HTTPStatus.NOT_FOUND),
        (ModelNotReady, HTTPStatus.SERVICE_UNAVAILABLE),
        (NotImplementedError, HTTPStatus.NOT_IMPLEMENTED),
        (ResourceExhausted, HTTPStatus.TOO_MANY_REQUESTS),
        (DeadlineExceeded, HTTPStatus.GATEWAY_TIMEOUT),
    ):
        app.add_exception_handler(kind, _named(status))
    return app


def _named(status: HTTPStatus) -> Any:
    async def answer(_: Any, error: Exception) -> JSONResponse:
        text = getattr(error, "details", None) or str(error)
        headers = {"Retry-After": "1"} if status is HTTPStatus.TOO_MANY_REQUESTS else None
        return JSONResponse({"error": text}, status_code=status, headers=headers)

    return answer


async def _start_grpc(config: ServerConfig, plane: DataPlane, models: ModelRepository) -> grpc.aio.Server:
    rpc = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),))
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceServicer(plane, ModelRepositoryExtension(models)), rpc
    )
    address = f"{config.host}:{config.grpc_port}"
    try:
        rpc.add_insecure_port(address)
    except RuntimeError as error:
        raise SidError("grpc_port", f"{address} is taken", "Choose another --grpc_port.") from error
    await rpc.start()
    return rpc


def _column(part: InferInput) -> pa.Array:
    """A feature as its owner writes it: texts, or numbers of any type."""
    values = np.asarray(part.as_numpy())
    if values.ndim != 1:
        raise SidError(part.name, f"shape {values.shape}", "Send one dimension.")
    if values.dtype.kind not in "OSU":
        return pa.array(values)
    try:
        return pa.array([v.decode() if isinstance(v, bytes) else v for v in values.tolist()], pa.string())
    except (UnicodeDecodeError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SidError(part.name, str(error).splitlines()[0], "Send texts in UTF-8, or numbers.") from error


def _integers(part: InferInput) -> Array:
    values = np.asarray(part.as_numpy())
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise SidError(
            part.name, f"{part.datatype} of shape {values.shape}", "Send INT64 of one dimension."
        )
    return values.astype(np.int64)
