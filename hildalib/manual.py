"""What `hilda COMMAND --help` shows below the options: examples that can be typed as they stand, and what they lead to.

Entry points: a text a command, named after it; `EXAMPLES` is that of `hilda --help`.
"""

RUN_EXAMPLES = """examples:
  hilda run                                 all notebooks, profile nano; what is up to date is left alone
  hilda run 04_decode --set seed=1          one notebook, one parameter changed
  hilda run --profile smol --jobs 2         a larger model, two notebooks at a time
  hilda run 02_wsd 03_sft --seeds 0 1 2     three seeds of two notebooks
  hilda run 03_sft --force                  again from scratch, though nothing changed

Parameters live in params/<profile>/<notebook>.yaml; the profile smoke is the notebooks' own defaults (seconds).
An interrupted run continues when the same command is given again.
"""
TRAIN_EXAMPLES = """examples:
  accelerate launch --num_processes 2 -m hildalib train 02_wsd --profile smol          two GPUs (DDP)
  torchrun --nproc_per_node 2 -m hildalib train 02_wsd --profile nano                  two processes on a CPU
  accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
      -m hildalib train 02_wsd --profile qwen3-0.6b                                    four GPUs, weights sharded over them
  hilda train 02_wsd --profile smol --arm dLLM                                         one process, one arm
  hilda run 02_wsd --profile smol                                                      then: what the trained arms can do

The processes share the rows of each step (micro-batches first, then the rows of one), so a run is the same run in any number of them: its
losses and weights are those of one process but for the order of sums, and what was interrupted continues in more or fewer.
"""
TUNE_EXAMPLES = """examples:
  hilda tune --sources my-pairs.jsonl --out my-model                                   lines {"prompt": ..., "response": ...}
  hilda tune --sources gsm_symbolic=3200 tinystories=800 --steps 600 --out sums          named corpora, so many pairs of each
  torchrun --nproc_per_node 2 -m hildalib tune --sources my-pairs.jsonl --out my-model two processes share each step
  hilda tune --model FOLDER --arm "plain conversion" --sources gsm8k --out other       a model that learns in all its weights
  hilda tune --sources my-pairs.jsonl --steps 0 --own-answers --out faster             the same texts in mode own, faster
  hilda generate "What is 17 + 25?" --chat --mode own --model my-model/model           then

The model that comes with HILDA is tuned as it was made: first its base, left to right, in adapters of its own (--steps), then the adapters
that draft for it (--draft-steps). What is not said here (rates, noise, batch) is that of params/<profile>/03_sft.yaml. The same command
continues what was interrupted, in any number of processes.
"""
COMPARE_EXAMPLES = """examples:
  hilda compare new=my-model/model old=smollm2-135m-dllm --tasks arithmetic sudoku --out comparison
  hilda compare own=MODEL:own Q=MODEL:Q single=MODEL:single --tasks gsm_symbolic --items 1000 --out comparison

Differences are the first one's minus each other's on the same prompt, with a 95 % interval over prompts and the p of an exact sign test; stories
are measured in nats a token under the judge, where less is better. Answers are kept in --out: the same command continues, and one with
further contestants asks only those. Tokens a second are of this machine as it was; ratios are good only where both ran alike.
"""
PLAN_EXAMPLES = """examples:
  hilda plan 02_wsd --profile qwen3-0.6b --memory 8GB
  hilda plan 02_wsd --profile qwen3-0.6b+pascal --memory 8GB --gflops 8000     for a card that is not here: its float32 rate
  hilda plan 03_sft --profile smol --set batch_size=16 --memory 4GiB           where it does not fit, what would make it fit

Nothing is loaded: the step is run on tensors without content, and every allocation counted. Memory is that of the step with the most
positions that can have a loss; time is operations over the matmul rate of this machine (or --gflops), a lower bound.
"""
TOKENISE_EXAMPLE = """example:
  hilda tokenise dolma:/data/dolma --model smollm2-135m --out /data/shards --jobs 16

Memory does not grow with the corpus; the bytes written do not depend on --jobs; the same command after a kill goes on at the last whole
shard. At the end: documents, tokens and bytes by source, and the throughput. In Python: packing.Packed(packing.open_shards(FOLDER), length).
"""
EXAMPLES = """examples:
  hilda smoke-test                          is the installation sound? (seconds, no download)
  hilda doctor                              what this machine supports, and which settings follow
  hilda run                                 execute the book (minutes on a laptop CPU)
  hilda status                              what is up to date, what is stale and why
  hilda plan 02_wsd --profile qwen3-0.6b --memory 8GB     what a training step needs, before it is started
  hilda tokenise dolma:FOLDER --model smollm2-135m --out FOLDER --jobs 8    a large corpus, once
  hilda generate "Once upon a time"         SmolLM2-135M as a dLLM; its base is downloaded once (98 MB)
  hilda tune --sources my-pairs.jsonl --out my-model      more tuning of that model, on pairs of your own
  hilda serve --model outputs/nano/03_sft/checkpoints/dLLM/model
  hilda export outputs/nano/03_sft/checkpoints/dLLM/model --to gguf

`hilda COMMAND --help` tells more. Environment: HILDA_OUTPUTS, HILDA_FIGURES, HILDA_CACHE, HILDA_DATA move the folders.
"""
GENERATE_EXAMPLE = """examples:
  hilda generate "Once upon a time, a little fox" --mode S
  hilda generate "What is 17 + 25?" --chat
  hilda run --profile nano                  makes the model of the next line (minutes)
  hilda generate "12+34=" --model outputs/nano/03_sft/checkpoints/dLLM/model --mode S --tau-mask 0.7 --max-new-tokens 32

MODEL must be converted: an autoregressive one, such as smollm2-135m itself, is refused with what to do.
"""
SERVE_EXAMPLES = """examples:
  hilda serve --model outputs/nano/03_sft/checkpoints/dLLM/model
  curl -N localhost:8000/generate -H "Content-Type: application/json" -d "{\\"prompt\\": \\"12+34=\\", \\"stream\\": true}"
  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d "{\\"prompt\\": \\"12+34=\\", \\"max_tokens\\": 32}"
  curl localhost:8000/jobs -H "Content-Type: application/json" -d "{\\"notebooks\\": [\\"04_decode\\"], \\"profile\\": \\"smoke\\"}"
  hilda serve --model MODEL --host 0.0.0.0 --allow-host lab-3.example.org      with the token in the variable HILDA_TOKEN

Routes: GET /health, POST /generate, POST /jobs, GET /jobs, GET /jobs/N, GET /jobs/N/watch, DELETE /jobs/N,
POST /v1/completions, POST /v1/chat/completions, GET /v1/models; GET /openapi.json describes their fields.
/generate with "stream": true sends a line of JSON for each forward: which tokens it wrote, and which it edited.
Needs the extra `serve`: python -m pip install -c constraints.txt -e ".[serve]"
"""
EXPORT_EXAMPLES = """examples:
  hilda export outputs/nano/03_sft/checkpoints/dLLM/model --to hf --out my-model     a folder to push to a hub
  hilda export my-model --to gguf                          weights for AR engines; the diffusion needs hildalib
  hilda export my-model --to onnx                          a graph that takes the attention mask, so AR and diffusion
  hilda export my-model --to int8                          eight-bit weights (bitsandbytes), plain Transformers
  hilda export adapter-folder --to merged                  LoRA adapters of a quantised base, added to its weights
  hilda export adapter-folder --to adapter                 LoRA on noisy rows in bfloat16, beside a base that has a name

Every export is read back and its logits are compared with the source's; one that computes something else is not kept.
onnx needs the extra `export`: python -m pip install -c constraints.txt -e ".[export]"
"""
