"""A target service without a model; run as a script, a whole service process."""

from __future__ import annotations

import asyncio
import time

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from specpair import errors
from specpair.v1 import target_pb2, target_pb2_grpc
from specpair_runtime.serving import ServiceConfig, ServiceStatus, annotate, configure_logs, run

SERVICE = "specpair.v1.TargetService"
SECRET = "the prompt of another user"


class FakeConfig(ServiceConfig):
    """A fake target."""

    model_config = SettingsConfigDict(env_prefix="SPECPAIR_FAKE_")

    verify_width: int = Field(8, ge=2, le=64, description="Rows of one verify step.")
    load_seconds: float = Field(0.0, description="How long 100% of loading takes.")
    load_error: str = Field("", description="What loading ends with.")
    close_seconds: float = Field(0.0, description="How long closing takes.")


class FakeTarget(target_pb2_grpc.TargetServiceServicer):
    """Fails as the text of a request says; otherwise answers with nothing in it."""

    def __init__(self, status: ServiceStatus) -> None:
        self.status = status
        self.open_sessions = 0

    async def GetModelInfo(self, request, context):
        response = target_pb2.TargetServiceGetModelInfoResponse()
        self.status.fill(response.info)
        return response

    async def Verify(self, request_iterator, context):
        self.open_sessions += 1
        try:
            async for request in request_iterator:
                annotate(rounds=request.block.round)
                self._fail_as_told(request.start.prompt.text)
                yield target_pb2.VerifyResponse(verdict=target_pb2.Verdict(round=request.block.round))
        finally:
            self.open_sessions -= 1

    async def Generate(self, request, context):
        yield target_pb2.GenerateResponse()
        self._fail_as_told(request.prompt.text)
        while request.prompt.text == "endless":
            await asyncio.sleep(0.01)
            yield target_pb2.GenerateResponse()

    async def Tokenize(self, request, context):
        self._fail_as_told(request.prompt.text)
        context.set_trailing_metadata((("x-peer", context.peer()),))
        if request.prompt.text == "overloaded":
            context.set_trailing_metadata((("x-note", "from the handler"),))
            raise errors.OverloadedError("no slot", reason="KV_SLOTS_EXHAUSTED", retry_after=1.5)
        return target_pb2.TokenizeResponse()

    async def Detokenize(self, request, context):
        return target_pb2.DetokenizeResponse()

    async def ExplainVerify(self, request, context):
        return target_pb2.ExplainVerifyResponse()

    def _fail_as_told(self, text: str) -> None:
        if text == "invalid":
            raise errors.InvalidRequestError("must not be so", field="start.prompt.text", reason="NOT_SO")
        if text == "crash":
            raise RuntimeError(SECRET)


def main() -> int:
    config = FakeConfig.parse()
    configure_logs(config.log_format, config.log_level)
    status = ServiceStatus()

    def load(status: ServiceStatus) -> None:
        for step in range(100):
            status.advance(step / 100)
            time.sleep(config.load_seconds / 100)
        if config.load_error == "typed":
            raise errors.ModelLoadError("no such directory", field="model")
        if config.load_error:
            raise ValueError(config.load_error)

    def register(server):
        target_pb2_grpc.add_TargetServiceServicer_to_server(FakeTarget(status), server)
        return [SERVICE]

    return run(config, register=register, load=load, status=status, close=lambda: time.sleep(config.close_seconds))


if __name__ == "__main__":
    raise SystemExit(main())
