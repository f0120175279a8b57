#!/usr/bin/env python3
"""Makes reference folders: what PyTorch computes for a model, a batch and some AdamW steps.

  dev/reference.py --out DIR [options]                  a random model
  dev/reference.py --out DIR --model FOLDER [options]   any Hugging Face GPT-2 model folder
  dev/reference.py --fixtures dev/fixtures              all committed references, from the table at the end

test_gpt2 --reference DIR compares them. Everything is computed by transformers' GPT2LMHeadModel and schedules
and torch.optim.AdamW, in float32. A folder holds config.json, model.safetensors and reference.safetensors:
  input_ids, attention_mask, position_ids, labels   I64 [B, T]
  logits      F32 [B, T, V], zeros at PAD
  loss        F32 [1]
  grad.NAME   for each tensor that is trained
  losses, grad_norms, learning_rates   F32 [S], for S updates: before each of them, and before clipping
  param.NAME  each tensor after the last update
and, as metadata, `options`: the train_gpt2 options with which the same updates are taken.
With --lora-rank the folder is an adapter's, made and computed by PEFT, and DIR/base is its model. Both A and B
begin at random, since with B = 0 no gradient would reach A. Names are those of the model, as in train_gpt2.

The updates are also taken in float64, and the largest relative difference is printed. AdamW divides a
gradient by its own size, so an element whose gradient is nothing but rounding (the key part of c_attn.bias,
always: a softmax does not change when every score gets the same addend) moves by up to the learning rate in a
random direction. An --epsilon well above that rounding keeps updates comparable; with 1e-8, freeze
attn.c_attn.bias.
"""
import argparse
import copy
import json
import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import peft
import torch
import transformers
from safetensors.torch import save_file

ILL_CONDITIONED = 2e-4  # a fifth of what test_gpt2 allows an update to differ


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="DIR")
    add("--fixtures", metavar="DIR")
    add("--model", metavar="FOLDER", help="instead of a random model")
    add("--seed", type=int, default=1)
    add("--attention", choices=["eager", "sdpa"], default="eager")
    add("--threads", type=int, default=1)
    add("--float32-only", action="store_true", help="do not take the updates in float64 too: for large models")
    random_model = parser.add_argument_group("random model").add_argument
    random_model("--vocab-size", type=int, default=61)
    random_model("--n-positions", type=int, default=16)
    random_model("--n-embd", type=int, default=24)
    random_model("--n-layer", type=int, default=1)
    random_model("--n-head", type=int, default=3)
    random_model("--n-inner", type=int)
    random_model("--layer-norm-epsilon", type=float, default=1e-5)
    random_model("--untied", action="store_true", help="lm_head.weight is a tensor of its own")
    random_model("--init-std", type=float, default=0.25, help="rough on purpose: every gradient is to matter")
    lora = parser.add_argument_group("an adapter, by PEFT").add_argument
    lora("--lora-rank", type=int, default=0)
    lora("--lora-alpha", type=float, help="twice the rank")
    lora("--lora-target", action="append", metavar="NAME", help="ends of names of modules, such as mlp.c_fc")
    batch = parser.add_argument_group("batch: random token ids, or --batch").add_argument
    batch("--batch", metavar="FILE",
          help="a JSON object a row: input_ids, attention_mask, perhaps labels and position_ids")
    batch("--seq-len", type=int, default=12, help="T, PAD included")
    batch("--lengths", default="12,7,10", help="tokens in each row; 0 is a row of nothing but PAD")
    batch("--pad", choices=["right", "left", "holes", "mixed"], default="right",
          help="mixed: these three in turn, row by row")
    batch("--prompts", help="in each row the first so many tokens are not scored, like 4,0,9")
    batch("--positions", choices=["tokens", "columns"], default="tokens", help="columns: PAD counts as well")
    train = parser.add_argument_group("training, as in train_gpt2 --help").add_argument
    train("--accumulate", type=int, default=1, help="the rows are so many micro-batches, in order")
    train("--steps", type=int, default=5)
    train("--learning-rate", type=float, default=1e-3)
    train("--warmup-steps", type=int, default=0)
    train("--schedule", choices=["linear", "cosine", "constant"], default="linear")
    train("--final-lr", type=float, default=0.0)
    train("--weight-decay", type=float, default=0.01)
    train("--no-decay", action="append", metavar="REGEX")
    train("--freeze", action="append", metavar="REGEX", default=[])
    train("--beta1", type=float, default=0.9)
    train("--beta2", type=float, default=0.999)
    train("--epsilon", type=float, default=1e-4)
    train("--max-grad-norm", type=float, default=1.0)
    args = parser.parse_args(words)
    if not (args.out or args.fixtures):
        parser.error("give --out DIR or --fixtures DIR")
    return args


def trainer_options(args):
    """The same training as train_gpt2 options."""
    words = []
    for name in ("learning_rate", "steps", "warmup_steps", "schedule", "final_lr", "weight_decay", "beta1",
                 "beta2", "epsilon", "max_grad_norm", "accumulate"):
        words += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    for regex in args.no_decay or []:
        words += ["--no-decay", regex]
    for regex in args.freeze:
        words += ["--freeze", regex]
    return " ".join(words)


def make_model(args):
    if args.model:
        config = transformers.AutoConfig.from_pretrained(args.model)
        config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = 0.0
        return transformers.GPT2LMHeadModel.from_pretrained(
            args.model, config=config, dtype=torch.float32, attn_implementation=args.attention)
    end_of_text = args.vocab_size - 1
    config = transformers.GPT2Config(
        vocab_size=args.vocab_size, n_positions=args.n_positions, n_embd=args.n_embd, n_layer=args.n_layer,
        n_head=args.n_head, n_inner=args.n_inner, layer_norm_epsilon=args.layer_norm_epsilon,
        tie_word_embeddings=not args.untied, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=end_of_text, eos_token_id=end_of_text, attn_implementation=args.attention)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if re.search(r"ln_.+weight", name) else 0.0, args.init_std)
    return model


def add_adapter(args):
    """The model in DIR/base with an adapter beside it, as PEFT adds it, its values at random."""
    base = transformers.GPT2LMHeadModel.from_pretrained(
        f"{args.out}/base", dtype=torch.float32, attn_implementation=args.attention)
    model = peft.get_peft_model(base, peft.LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        target_modules=args.lora_target or ["attn.c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0.0, args.init_std)
    return model


def parameters(model):
    """All parameters by the names that they have in train_gpt2."""
    return {name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", "."): p
            for name, p in model.named_parameters()}


def make_batch(args, vocab_size):
    """Token ids, mask, positions and labels [B, T]."""
    if args.batch:
        with open(args.batch) as file:
            rows = [json.loads(line) for line in file if line.strip()]
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        ids, mask = batch["input_ids"], batch["attention_mask"]
    else:
        # PAD is <|endoftext|>, as tokenizers do it, and so is each row's last token: only the mask tells.
        lengths = [int(n) for n in args.lengths.split(",")]
        B, T = len(lengths), args.seq_len
        mask = torch.zeros(B, T, dtype=torch.long)
        ids = torch.randint(vocab_size, (B, T))
        for b, n in enumerate(lengths):
            pad = ["right", "left", "holes"][b % 3] if args.pad == "mixed" else args.pad
            columns = {"right": torch.arange(n), "left": torch.arange(T - n, T),
                       "holes": torch.randperm(T)[:n].sort().values}[pad]
            mask[b, columns] = 1
            ids[b, columns[-1:]] = vocab_size - 1
        ids[mask == 0] = vocab_size - 1
        batch = {"input_ids": ids, "attention_mask": mask}
    count = mask.cumsum(1)
    if "position_ids" not in batch:
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        batch["position_ids"] = columns.contiguous() if args.positions == "columns" else (count - 1) * mask
    # Hugging Face's labels are aligned with input_ids: position t-1 predicts labels[t]. PAD must neither be
    # predicted nor predict anything, so labels[t] is -100 where t is PAD, and where t-1 is.
    labels = batch.get("labels", ids).clone()
    labels[mask == 0] = -100
    labels[:, 1:][mask[:, :-1] == 0] = -100
    if args.prompts:
        prompts = torch.tensor([int(n) for n in args.prompts.split(",")])
        labels[count <= prompts[:, None]] = -100
    batch["labels"] = labels
    return batch


def accumulate(model, batch, micro_batches):
    """Forward and backward over all micro-batches: adds to .grad, returns the update's loss and logits."""
    targets = (batch["labels"][:, 1:] != -100).sum()
    B = len(batch["labels"])
    loss, logits = 0.0, []
    for rows in range(0, B, B // micro_batches):
        micro = {key: value[rows:rows + B // micro_batches] for key, value in batch.items()}
        out = model(**micro, num_items_in_batch=targets)  # sum of token losses / targets of the whole update
        out.loss.backward()
        loss += out.loss.item()
        logits.append(out.logits.detach())
    return loss, torch.cat(logits)


def compute(model, batch, args):
    """All results of a reference. The model's parameters change."""
    model.eval()
    params = parameters(model)
    no_decay = ["bias", "ln_.+weight", "ln_.+bias"] if args.no_decay is None else args.no_decay
    no_decay = [] if no_decay == ["none"] else no_decay
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in params.items():
        base = args.lora_rank and ".lora_" not in name
        p.requires_grad_(not base and not any(re.search(regex, name) for regex in args.freeze))
        if p.requires_grad:
            groups[any(re.search(regex, name) for regex in no_decay)]["params"].append(p)
    trained = {name: p for name, p in params.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2),
                                  eps=args.epsilon)
    W, N = args.warmup_steps, args.steps
    if args.schedule == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, W)
    elif args.schedule == "linear":
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, W, N)
    else:
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, W, N)

    results, losses, norms, rates = {}, [], [], []
    for step in range(N):
        optimizer.zero_grad()
        loss, logits = accumulate(model, batch, args.accumulate)
        if step == 0:
            assert torch.isfinite(logits).all()
            results["logits"] = logits * batch["attention_mask"][:, :, None]
            results["loss"] = torch.tensor([loss])
            results |= {"grad." + name: p.grad.clone() for name, p in trained.items()}
        losses.append(loss)
        norms.append(sum(p.grad.double().square().sum() for p in trained.values()).sqrt().item())
        if args.max_grad_norm > 0:
            # by the exact norm: clip_grad_norm_ sums in float32, which is 2e-5 off for 124M parameters, and ten
            # updates at rate 1e-3 make 1e-4 of it in the loss (train_gpt2 stays within 1e-7 of float64 there)
            torch.nn.utils.clip_grads_with_norm_(trained.values(), args.max_grad_norm,
                                                 torch.tensor(norms[-1], dtype=torch.float32))
        if step >= W:  # --final-lr is a floor under what transformers' schedule says
            for group in optimizer.param_groups:
                group["lr"] = max(group["lr"], args.final_lr * args.learning_rate)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    results |= {"losses": torch.tensor(losses), "grad_norms": torch.tensor(norms)}
    results |= {"learning_rates": torch.tensor(rates)}
    return results | {"param." + name: p.detach() for name, p in params.items()}


def make_reference(args):
    """One folder. Returns how far the updates are from float64's: (worst relative L2 difference, tensor)."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = make_model(args)
    batch = make_batch(args, model.config.vocab_size)
    if len(batch["labels"]) % args.accumulate:
        sys.exit(f"{args.out}: {len(batch['labels'])} rows cannot be {args.accumulate} equal micro-batches")
    if not (batch["labels"][:, 1:] != -100).any():
        sys.exit(f"{args.out}: no label is scored")
    os.makedirs(args.out, exist_ok=True)
    folder = f"{args.out}/base" if args.lora_rank else args.out
    model.save_pretrained(folder)
    generation_config = os.path.join(folder, "generation_config.json")
    if os.path.exists(generation_config):
        os.remove(generation_config)
    if args.lora_rank:
        model = add_adapter(args)
        model.save_pretrained(args.out)
        os.remove(f"{args.out}/README.md")  # a form that PEFT leaves to be filled in

    initial = {name: p.detach().clone() for name, p in parameters(model).items()}
    double = None if args.float32_only else copy.deepcopy(model).double()
    results = compute(model, batch, args)
    exact = compute(double, batch, args) if double else {}
    worst = (0.0, "")
    for name, start in initial.items() if exact else ():
        update = exact["param." + name] - start
        error = (results["param." + name] - start - update).norm() / update.norm().clamp(min=1e-30)
        worst = max(worst, (error.item(), name))

    tensors = {key: value.contiguous() for key, value in batch.items()}
    tensors |= {key: value.float().contiguous() for key, value in results.items()}
    path = os.path.join(args.out, "reference.safetensors")
    save_file(tensors, path, metadata={"options": trainer_options(args)})
    size = sum(entry.stat().st_size for entry in os.scandir(args.out))
    print(f"{args.out}: {size / 1000:.0f} kB, {args.steps} steps, loss {results['losses'][0]:.4f} to "
          f"{results['losses'][-1]:.4f}, gradient norm {results['grad_norms'][0]:.3f}"
          + (f", update against float64 {worst[0]:.1e} in {worst[1]}" if exact else ""), flush=True)
    return worst


# The committed references: name -> options.
FIXTURES = {
    "right-pad": "--seed 1 --lengths 12,7,10 --n-layer 2 --n-embd 16 --n-head 2",
    "left-pad": "--seed 2 --pad left --lengths 12,5,9 --schedule cosine --warmup-steps 2",
    "left-pad-column-positions": "--seed 3 --pad left --lengths 8,12 --positions columns --schedule constant",
    "holes": "--seed 4 --pad holes --lengths 11,16,20,9 --seq-len 20 --n-positions 20 --n-layer 2 --n-embd 18"
             " --steps 6 --warmup-steps 2",
    "length-one": "--seed 5 --lengths 1,12,1,2 --n-head 4 --n-embd 20 --schedule cosine --final-lr 0.3",
    "all-pad-row": "--seed 6 --lengths 6,0,9,0 --pad left --seq-len 9 --n-positions 9 --vocab-size 37",
    "prompts": "--seed 7 --lengths 12,9,12,4 --prompts 5,8,0,4 --weight-decay 0.1 --max-grad-norm 0.5",
    "freeze-embeddings": "--seed 8 --freeze wte --freeze wpe --n-layer 2 --n-embd 16 --n-head 2",
    "freeze-lower-blocks": r"--seed 9 --freeze wte|wpe --freeze \.h\.[01]\. --n-layer 3 --n-embd 12"
                           " --n-head 2 --warmup-steps 5 --schedule cosine",
    "biases-only": "--seed 10 --freeze weight --n-layer 2 --n-embd 16 --n-head 4 --learning-rate 0.002",
    "accumulate-uneven": "--seed 11 --accumulate 3 --lengths 12,12,1,3,7,2 --prompts 0,0,0,0,5,0"
                         " --weight-decay 0.2",
    "accumulate-unscored": "--seed 12 --accumulate 2 --pad holes --lengths 9,12,12,5 --prompts 2,0,12,5"
                           " --max-grad-norm 0",
    "head-size-5": "--seed 13 --n-embd 35 --n-head 7 --vocab-size 53 --no-decay none --weight-decay 0.5",
    "head-size-7": "--seed 14 --n-embd 21 --n-head 3 --n-inner 50 --layer-norm-epsilon 1e-3 --no-decay wpe"
                   " --no-decay mlp.c_fc --weight-decay 0.5",
    "one-wide-head": "--seed 15 --n-embd 48 --n-head 1 --n-inner 24 --vocab-size 41 --schedule constant"
                     " --warmup-steps 2",
    "large-scores": "--seed 20 --init-std 0.6 --n-layer 2 --n-embd 16 --n-head 2 --max-grad-norm 0.1",
    "attention-tiles": "--seed 16 --init-std 0.4 --n-embd 16 --n-head 2 --vocab-size 37 --seq-len 300"
                       " --n-positions 300 --lengths 300,258",
    "attention-tiles-holes": "--seed 17 --init-std 0.4 --n-embd 10 --n-head 2 --vocab-size 37 --seq-len 280"
                             " --n-positions 280 --lengths 270,65,129 --pad holes --prompts 100,60,0",
    "untied-head": "--seed 18 --untied --vocab-size 211 --n-embd 12 --n-head 2 --lengths 12,8",
    "adam": "--seed 19 --beta1 0.8 --beta2 0.95 --epsilon 1e-8 --freeze attn.c_attn.bias --weight-decay 0.1"
            " --init-std 0.15 --max-grad-norm 0 --steps 6 --final-lr 0.5",
    "lora": "--seed 21 --lora-rank 3 --lora-alpha 5 --lora-target attn.c_attn --lora-target h.1.mlp.c_proj --n-layer 2"
            " --n-embd 16 --n-head 2 --vocab-size 37 --lengths 12,7,10,4 --accumulate 2 --weight-decay 0.2",
}


def main():
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.out:
        make_reference(args)
        return
    for name, options in FIXTURES.items():
        error, tensor = make_reference(parse(["--out", f"{args.fixtures}/{name}"] + options.split()))
        if error > ILL_CONDITIONED:
            sys.exit(f"{name}: rounding decides too much of the update of {tensor}: raise --epsilon")


if __name__ == "__main__":
    main()
