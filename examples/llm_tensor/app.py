"""Generate text with a language model whose layers are split over all GPUs, and stream it token by token.

drumline run examples/llm_tensor/app.yaml                      # GPUs, the real model
drumline run examples/llm_tensor/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 2 MB
"""

from __future__ import annotations

from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
import torch.distributed as dist
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.distributed import DistributedConfig

from drumline.distributed import DistributedWorker
from drumline.testing.tiny import on_every_rank
from drumline.testing.tiny_lm import tiny_llama
from drumline.training import check_heads

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for the first bytes of a longer character


class Generate(DistributedWorker):
    """Tensor parallel text generation through transformers' own plan."""

    def setup(self, model: str = "Qwen/Qwen3-8B") -> None:
        """Check that the model can be split, then load this rank's part of each layer.

        Args:
            model: repository or folder of a causal language model, or ``tiny``: a random one, built here.
        """
        if model == "tiny":
            model = str(on_every_rank(tiny_llama, self.rank))
        check_heads(AutoConfig.from_pretrained(model), self.world_size)  # says so now, not after minutes of loading
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        split = DistributedConfig(tp_size=self.world_size, tp_plan="auto")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, distributed_config=split).eval()

    @torch.inference_mode()
    def __call__(
        self,
        streaming: bool = False,
        *,
        prompt: Annotated[str, Field(min_length=1, max_length=100_000)],
        max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256,
        temperature: Annotated[float, Field(ge=0, le=2)] = 0.0,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Continue a text.

        Args:
            streaming: send the new text with every token.
            prompt: what to continue.
            max_tokens: of the answer.
            temperature: 0 always takes the most likely token.
            seed: of the draws above temperature 0.

        Returns:
            ``{"text", "tokens": how many, "finish": "stop" or "length"}`` on rank 0.
        """
        generator = torch.Generator().manual_seed(seed)
        last = torch.tensor([self.tokenizer(prompt)["input_ids"]], device=self.device)
        cache = DynamicCache(config=self.model.config)
        found: list[int] = []
        shown, finish = "", "length"
        while len(found) < max_tokens:
            self.checkpoint()  # a cancelled request ends here, on all ranks at the same token
            logits = self.model(input_ids=last, past_key_values=cache, use_cache=True).logits[0, -1]
            last = self.choose(logits.float().cpu(), temperature, generator)
            if last.item() == self.tokenizer.eos_token_id:
                finish = "stop"
                break
            found.append(int(last.item()))
            if streaming and self.rank == 0:
                text = self.tokenizer.decode(found)
                if not text.endswith(UNFINISHED) or len(found) == max_tokens:
                    self.add_streaming_result({"text": text[len(shown) :], "tokens": len(found)})
                    shown = text
        return {"text": self.tokenizer.decode(found), "tokens": len(found), "finish": finish}

    def choose(self, logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
        """Return the next token (1, 1): rank 0's choice, for ranks that disagree would wait for each other for ever."""
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        token = token.to(self.device)
        dist.broadcast(token, src=0)
        return token[None]
