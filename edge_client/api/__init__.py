"""The edge as a synchronous Python object, in transformers' manner. `docs/python-api.md` describes it.

    from edge_client import SplitModelForCausalLM

    with SplitModelForCausalLM.from_server("http://127.0.0.1:8700") as model:
        ids = model.generate(model.tokenizer("Once upon a time")["input_ids"], max_new_tokens=32)
        print(model.tokenizer.decode(ids[0]))

Whoever has an event loop already takes `edge_client.runtime.EdgeRuntime`.
"""

from edge_client.api.hidden import HiddenStates
from edge_client.api.model import SplitModelForCausalLM
from edge_client.api.outputs import CausalOutput, GenerateOutput

__all__ = ["CausalOutput", "GenerateOutput", "HiddenStates", "SplitModelForCausalLM"]
