"""Records for tests, and strategies that draw them."""

from __future__ import annotations

from hypothesis import strategies as st

from loadtest.records import Footprint, Record

milliseconds = st.one_of(st.just(0.0), st.floats(1e-4, 1e6))
counts = st.integers(0, 10_000)


@st.composite
def footprints(draw: st.DrawFn, *, answered: bool) -> Footprint:
    prompt, decode = draw(counts), draw(counts)
    return Footprint(
        prompt_rows=prompt,
        decode_rows=decode,
        either_rows=draw(st.integers(0, 5)),
        steps=draw(st.integers(0, prompt)) + decode,
        open_rows=0 if answered else draw(st.integers(1, 200)),
        bytes_up=draw(counts),
        bytes_down=draw(counts),
    )


@st.composite
def records(draw: st.DrawFn) -> Record:
    error = draw(st.sampled_from([None, None, None, "OutOfPages", "ServerUnreachable"]))
    tokens = draw(st.integers(1, 6))
    opened = error is None or draw(st.booleans())
    return Record(
        index=draw(st.integers(0, 1000)),
        process=draw(st.integers(0, 3)),
        warmup=draw(st.booleans()),
        start_s=0.0,
        prompt_tokens=draw(st.integers(1, 100)),
        output_tokens=tokens,
        ttft_ms=draw(milliseconds),
        itl_ms=draw(st.lists(milliseconds, min_size=tokens - 1, max_size=tokens - 1)),
        total_ms=draw(milliseconds),
        round_trips=tokens,
        error=error,
        message="why" if error else "",
        footprint=draw(footprints(answered=error is None)) if opened else None,
    )
