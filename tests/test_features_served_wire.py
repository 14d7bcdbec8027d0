"""The messages between trainer and feature server: safetensors bytes, and clear refusals of anything else."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.features.wire import (
    FeatureAnswer,
    FeatureRequest,
    WireError,
    decode,
    decode_answer,
    decode_request,
    encode,
    encode_answer,
    encode_request,
)

REQUEST = FeatureRequest(
    input_ids=torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32),
    lengths=(2, 3),
    final_places=torch.tensor([0, 4], dtype=torch.int32),
    layer_ids=(-1, 3),
    dtype=torch.bfloat16,
    id="seven",
)
ANSWER = FeatureAnswer(
    context=torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16(),
    final=torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16(),
    fingerprint="f" * 64,
    request_id="seven",
)


def joined(pieces) -> bytes:
    return b"".join(pieces)


def as_tensor(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def test_request_comes_back():
    read = decode_request(as_tensor(joined(encode_request(REQUEST))))
    assert torch.equal(read.input_ids, REQUEST.input_ids)
    assert torch.equal(read.final_places, REQUEST.final_places)
    assert (read.lengths, read.layer_ids, read.dtype, read.id) == ((2, 3), (-1, 3), torch.bfloat16, "seven")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answer_comes_back_bit_for_bit(dtype):
    request = dataclasses.replace(REQUEST, dtype=dtype)
    answer = dataclasses.replace(ANSWER, context=ANSWER.context.to(dtype), final=ANSWER.final.to(dtype))
    read = decode_answer(as_tensor(joined(encode_answer(answer))), request, hidden_size=8)
    assert torch.equal(read.context, answer.context)
    assert torch.equal(read.final, answer.final)
    assert read.fingerprint == "f" * 64


def test_nothing_wanted_of_the_final_state():
    request = dataclasses.replace(REQUEST, final_places=REQUEST.final_places[:0])
    assert decode_request(as_tensor(joined(encode_request(request)))).final_places.shape == (0,)
    answer = dataclasses.replace(ANSWER, final=ANSWER.final[:0])
    assert decode_answer(as_tensor(joined(encode_answer(answer))), request, 8).final.shape == (0, 8)


def test_the_library_reads_and_writes_the_same_format():
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int32), "c": torch.zeros(0, 2).bfloat16()}
    read = safetensors.torch.load(joined(encode({"key": "value"}, tensors)))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    metadata, ours = decode(as_tensor(safetensors.torch.save(tensors, {"key": "value"})))
    assert metadata == {"key": "value"}
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)


def test_decoding_copies_nothing():
    message = as_tensor(joined(encode({}, {"a": torch.zeros(4)})))
    _, tensors = decode(message)
    message[-1] = 64
    assert tensors["a"][-1] != 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lengths": (2, 4)}, "lengths: must be positive and sum to the 5 tokens"),
        ({"lengths": (5, 0)}, "lengths: must be positive"),
        ({"lengths": ()}, "lengths: must be positive"),
        ({"final_places": torch.tensor([4, 0], dtype=torch.int32)}, "final_places: must increase and lie in 0 to 4"),
        ({"final_places": torch.tensor([5], dtype=torch.int32)}, "final_places: must increase"),
        ({"final_places": torch.tensor([-1], dtype=torch.int32)}, "final_places: must increase"),
        ({"layer_ids": ()}, r"layer_ids=\[\]: must be a JSON list of integers"),
        ({"layer_ids": ("a",)}, "layer_ids="),
        ({"dtype": torch.int32}, "dtype=int32: must be one of float32, bfloat16, float16"),
    ],
)
def test_requests_that_make_no_sense(change, expected):
    with pytest.raises(WireError, match=expected):
        decode_request(as_tensor(joined(encode_request(dataclasses.replace(REQUEST, **change)))))


def test_another_version():
    message = joined(encode({"format": "2", "dtype": "float32", "layer_ids": "[1]"}, {}))
    with pytest.raises(WireError, match="format 2: this side speaks format 1"):
        decode_request(as_tensor(message))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"request_id": "six"}, "an answer to request 'six' instead of 'seven'"),
        ({"context": ANSWER.context[:4]}, r"context: expected \[5, 16\] of torch.bfloat16, got \[4, 16\]"),
        ({"final": ANSWER.final.float()}, r"final: expected \[2, 8\] of torch.bfloat16, got \[2, 8\] of torch.float32"),
    ],
)
def test_answers_to_something_else(change, expected):
    message = joined(encode_answer(dataclasses.replace(ANSWER, **change)))
    with pytest.raises(WireError, match=expected):
        decode_answer(as_tensor(message), REQUEST, hidden_size=8)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {}, "a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b"[" * 2000,
    ],
)
def test_headers_that_lie(header):
    header += b" " * (-len(header) % 8)
    with pytest.raises(WireError):
        decode(as_tensor(struct.pack("<Q", len(header)) + header + b"1234"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_messages_are_refused_or_read_but_never_crash(data):
    message = bytearray(joined(encode_request(REQUEST)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message) - 1))
        if data.draw(st.booleans()):
            message[place] = data.draw(st.integers(0, 255))
        else:
            del message[place:]
            break
    try:
        read = decode_request(as_tensor(bytes(message)))
    except WireError:
        return
    assert sum(read.lengths) == read.tokens


def test_header_is_json_that_anyone_can_read():
    message = joined(encode_request(REQUEST))
    size = struct.unpack("<Q", message[:8])[0]
    header = json.loads(message[8 : 8 + size])
    assert header["__metadata__"] == {"format": "1", "id": "seven", "layer_ids": "[-1, 3]", "dtype": "bfloat16"}
    assert header["input_ids"] == {"dtype": "I32", "shape": [5], "data_offsets": [0, 20]}
