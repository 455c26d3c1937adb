"""Jobs over REST: create one, ask how it stands, fetch the adapters that all share. Blocking."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from split_llama.errors import FlLlamaError, NotAServer, NotOwner, ServerUnreachable
from split_llama.lora import Adapter, parse_adapter
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.trust import tls_context
from training.job_config import JobConfig
from training.settings import TrainSettings

KEY_HEADER = "X-FL-Job-Key"
MAX_JSON_BYTES = 16 * 2**20
LONGEST_PAUSE = 3.0


@dataclass(frozen=True, slots=True)
class JobKey:
    """Where a job is and what opens it. The server shows the key once, to who creates the job."""

    id: str
    key: str


class JobsClient:
    """HTTP client for `/v1/jobs`. A server that cannot be reached is asked again for `retry_seconds`."""

    def __init__(self, client: httpx.Client, address: ServerAddress, retry_seconds: float) -> None:
        self._client = client
        self._address = address
        self._retry_seconds = retry_seconds

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, settings: TrainSettings, retry_seconds: float | None = None, patience: float = 60.0
    ) -> Iterator[JobsClient]:
        """Make the client that the settings ask for, for a block; an answer may take `patience` seconds.

        Raises `UsageError`.
        """
        address = ServerAddress.parse(settings.edge("1,1", "fp32").server_url())
        with (
            failures.proxy_errors(address.base),
            httpx.Client(
                headers={"User-Agent": "fl-llama", **authorization(settings.api_key)},
                verify=tls_context(settings.ca_certs),
                timeout=httpx.Timeout(patience, connect=min(patience, 10.0)),
            ) as client,
        ):
            yield cls(client, address, settings.reconnect_seconds if retry_seconds is None else retry_seconds)

    def create(self, config: JobConfig) -> JobKey:
        """Create a job. Raises what the server refuses with, `NotAServer`, `ServerUnreachable`."""
        raw = self._json("POST", "/v1/jobs", content=config.model_dump_json(exclude_none=True).encode())
        try:
            return JobKey(str(raw["id"]), str(raw["key"]))
        except (KeyError, TypeError):
            raise NotAServer(f"{self._address.base}: the answer names no job; is it a split-server?") from None

    def config(self, job: JobKey) -> JobConfig:
        """Ask for the job's configuration. Raises as `create`, and `UnknownJob`, `NotOwner`."""
        return self.config_in(job, self.status(job))

    def config_in(self, job: JobKey, raw: Mapping[str, Any]) -> JobConfig:
        """Take the job's configuration out of its status. Raises `NotAServer`, `UsageError`."""
        if not isinstance(raw.get("config"), dict):
            raise NotAServer(f"{self._address.base}: the answer has no job's configuration")
        return JobConfig.parse(raw["config"], f"job {job.id} of {self._address.base}")

    def status(self, job: JobKey) -> dict[str, Any]:
        """Ask how the job stands: state, step, loss, members ... Raises as `config`."""
        raw = self._json("GET", f"/v1/jobs/{job.id}", headers={KEY_HEADER: job.key})
        if not isinstance(raw, dict):
            raise NotAServer(f"{self._address.base}: the answer describes no job")
        return raw

    def cancel(self, job: JobKey) -> None:
        """End the job. Raises as `config`."""
        self._ask("DELETE", f"/v1/jobs/{job.id}", headers={KEY_HEADER: job.key})

    def adapter(self, job: JobKey) -> Adapter:
        """Fetch the adapters that all share as they are now. Raises as `config`, `CheckpointError`."""
        response = self._ask("GET", f"/v1/jobs/{job.id}/adapter", headers={KEY_HEADER: job.key})
        return parse_adapter(response.content, f"{self._address.base}/v1/jobs/{job.id}/adapter")

    def _json(self, method: str, path: str, **options: Any) -> Any:
        response = self._ask(method, path, **options)
        if len(response.content) > MAX_JSON_BYTES:
            raise NotAServer(f"{self._address.base}{path}: the answer has {len(response.content)} bytes")
        try:
            return json.loads(response.content)
        except ValueError:
            raise self._refusal(response) from None

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        deadline, pause = time.monotonic() + self._retry_seconds, 0.1
        while True:
            try:
                return self._ask_once(method, path, options)
            except FlLlamaError as error:
                may_pass = isinstance(error, ServerUnreachable) or error.retry_after_ms > 0
                pause = max(min(2 * pause, LONGEST_PAUSE), error.retry_after_ms / 1000)
                if not may_pass or time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)

    def _ask_once(self, method: str, path: str, options: Mapping[str, Any]) -> httpx.Response:
        base = self._address.base
        headers = {"Content-Type": "application/json"} | dict(options.get("headers", {}))
        try:
            response = self._client.request(method, f"{base}{path}", headers=headers, content=options.get("content"))
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise failures.unreachable(base, error) from error
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _refusal(self, response: httpx.Response) -> FlLlamaError:
        kind, retry = response.headers.get("content-type", ""), response.headers.get("retry-after", "")
        refusal = failures.refused(self._address.base, response.status_code, kind, response.content, retry)
        if isinstance(refusal, NotOwner) and KEY_HEADER in refusal.message:
            # On a command line nobody sends headers.
            return NotOwner(
                "this key does not open the job: give the one that its creator was told, with --job-key KEY"
            )
        return refusal
