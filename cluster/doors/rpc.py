"""The gRPC door: manta.inference.v1 over the same validator and the same calls as HTTP."""

from collections.abc import AsyncGenerator

from manta.cluster.doors.rpc_chat import chat
from manta.cluster.doors.rpc_embed import embed
from manta.cluster.doors.rpc_errors import answered, streamed
from manta.cluster.doors.rpc_generate import generate
from manta.cluster.doors.rpc_load import LoadWatch, load_message
from manta.cluster.doors.service import Service
from manta.cluster.doors.state import answer_in_time, manta_version
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc


class InferenceServicer(pb_grpc.InferenceServicer):
    """The methods of the service, to be registered with `rpc_messages.add_service`. Errors are status codes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._load_watch = LoadWatch(service.client)

    @streamed
    def Generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        return generate(self._service, request)

    @streamed
    def Chat(self, request: pb.ChatRequest) -> AsyncGenerator[pb.ChatResponse, None]:
        return chat(self._service, request)

    @answered
    async def Embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        return await embed(self._service, request)

    @answered
    async def Tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        validator = self._service.validator
        adds_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await validator.encode(request.text, adds_special)
        return pb.TokenizeResponse(ids=token_ids, max_model_len=validator.limits.max_model_len)

    @answered
    async def Detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        validator = self._service.validator
        token_ids = validator.check_tokens(list(request.ids), "ids")
        return pb.DetokenizeResponse(text=validator.tokenizer.decode(token_ids))

    @answered
    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._service.running.abort(request.request_id))

    @answered
    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        info = await answer_in_time(self._service.client.info())
        config, limits = self._service.config, self._service.validator.limits
        return pb.GetModelInfoResponse(
            model=limits.model_name,
            path=config.model,
            architecture=limits.architecture,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            data_parallel_size=config.data_parallel_size,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            version=manta_version(),
        )

    @answered
    async def GetLoad(self, request: pb.GetLoadRequest) -> pb.GetLoadResponse:
        return load_message(await answer_in_time(self._service.client.load()))

    @streamed
    def WatchLoad(self, request: pb.WatchLoadRequest) -> AsyncGenerator[pb.GetLoadResponse, None]:
        return self._load_watch.watch(request)
