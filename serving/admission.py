"""What a server says of itself, and what OPEN asks for checked against it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from serving.hosted import Hosted
from serving.registry import Entry
from split_llama.config import BlockRange, Partition
from split_llama.errors import BadRequest, ModelMismatch, PartitionNotAllowed
from split_llama.wire.codec import Codec
from split_llama.wire.control import HelloReply, Open
from split_llama.wire.frame import VERSION


def server_version() -> str:
    """Give the version of the installed distribution."""
    try:
        return version("fl-llama")
    except PackageNotFoundError:
        return "0+unknown"


def hello(hosted: Hosted) -> HelloReply:
    """Say what is hosted and allowed."""
    return HelloReply(
        protocol=VERSION,
        server=f"fl-llama/{server_version()}",
        model=hosted.name,
        blocks=(hosted.blocks.start, hosted.blocks.stop),
        hidden_size=hosted.config.hidden_size,
        geometry=hosted.geometry,
        codecs=tuple(codec.label for codec in Codec),
        max_frame_bytes=hosted.max_frame_bytes,
        max_message_bytes=hosted.max_message_bytes,
        max_step_rows=hosted.terms.max_step_rows,
        max_model_len=hosted.max_model_len,
    )


def check_request(hosted: Hosted, request: Open) -> None:
    """Check all that costs nothing. Raises `BadRequest`, `ModelMismatch`, `PartitionNotAllowed`."""
    if request.adapter is not None:
        hosted.adapters.find(request.adapter)
    if request.hops:
        raise BadRequest("hops: this server does not forward to other servers; leave the list empty")
    if request.geometry is not None and request.geometry != hosted.geometry:
        raise ModelMismatch(
            "the geometry of the edge's model (config.json) is not the server's: both must hold the same model"
        )
    blocks, count = BlockRange(*request.blocks), hosted.config.num_hidden_layers
    if blocks.stop > count:
        raise PartitionNotAllowed(f"blocks {blocks} asked for, the model has {count} blocks")


def check_attach(entry: Entry, hosted: Hosted, request: Open) -> None:
    """Check that ATTACH means the session as it was opened. Raises what `check_request` does, and `ModelMismatch`."""
    check_request(hosted, request)
    blocks = BlockRange(*request.blocks)
    if blocks != entry.blocks:
        raise ModelMismatch(f"ATTACH asks for blocks {blocks}, the session was opened over {entry.blocks}")
    adapter = hosted.adapters.name(entry.session.sequence.adapter)
    if request.adapter != adapter:
        raise ModelMismatch(f"ATTACH asks for the adapter {request.adapter}, the session was opened with {adapter}")
    for name, theirs, ours in zip(
        ("weights", "tokenizer"), (request.weights, request.tokenizer), entry.digests, strict=True
    ):
        if theirs is not None and ours is not None and theirs != ours:
            raise ModelMismatch(f"ATTACH gives another {name} digest than the session was opened with")


async def check_digests(hosted: Hosted, request: Open) -> None:
    """Check the digests that the edge gave, in a thread: hashing takes seconds. Raises `ModelMismatch`."""
    start, stop = request.blocks
    partition = Partition(start, hosted.config.num_hidden_layers - stop)
    manifest = await hosted.slices.manifest(partition)
    weights, tokenizer = manifest.digest, manifest.tokenizer_digest
    for name, theirs, ours in (("weights", request.weights, weights), ("tokenizer", request.tokenizer, tokenizer)):
        if theirs is not None and theirs != ours:
            raise ModelMismatch(
                f"the {name} digest of the edge is {theirs[:12]}..., the server's for partition {partition} is "
                f"{ours[:12]}...: the two hold different models; fetch the slice again or check MODEL on both sides"
            )
