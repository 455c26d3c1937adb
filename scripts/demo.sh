#!/usr/bin/env bash
# A split-server and an edge-client on this machine, with the bundled model. Text goes to stdout, all else to stderr.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
work=$(mktemp -d)
server=""
say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

stop() {
  status=$?
  trap - EXIT INT TERM
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" 2>/dev/null || true
  fi
  # 128 and above: interrupted, which needs no explanation.
  if [ "$status" -ne 0 ] && [ "$status" -lt 128 ] && [ -s "$work/server.log" ]; then
    echo "The demo failed (exit code $status). The end of the server's log:" >&2
    tail -n 30 "$work/server.log" >&2
  fi
  rm -rf "$work"
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Loopback must not go through a proxy, and the demo leaves nothing in the user's folders.
export NO_PROXY="127.0.0.1,${NO_PROXY:-}" no_proxy="127.0.0.1,${no_proxy:-}"
export FL_LLAMA_EDGE_CACHE_DIR="$work/cache" FL_LLAMA_EDGE_STATE_DIR="$work/state"

port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url="http://127.0.0.1:$port"

say "1. The server: split-server demo, on $url. It hosts the middle blocks only."
"$bin/split-server" demo --host 127.0.0.1 --port "$port" >"$work/server.log" 2>&1 &
server=$!

"$bin/python" - "$url/readyz" "$server" <<'PY'
import os, sys, time, urllib.error, urllib.request

url, server = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + 120
while time.monotonic() < end:
    try:
        with urllib.request.urlopen(url, timeout=2):
            sys.exit(0)
    except (urllib.error.URLError, OSError):
        time.sleep(0.1)
    try:
        os.kill(server, 0)
    except ProcessLookupError:
        sys.exit("the server ended before it was ready")
sys.exit("the server was not ready after 120 seconds")
PY

say "2. The edge fetches its own blocks from the server, and continues a story. The server sees hidden states only."
story="Once upon a time, Emma and Ben had a busy day."
echo "Prompt: $story" >&2
"$bin/edge-client" generate --server "$url" --prompt "$story" --max-new-tokens 60

say "3. A question about a short text."
question="Emma is in the garden. Ben is in the kitchen. Emma walks to the library. Where is Emma?"
echo "Prompt: $question" >&2
"$bin/edge-client" generate --server "$url" --chat --prompt "$question" --max-new-tokens 40

say "4. The server is stopped. Next: README.md"
