"""TRL's SFTTrainer with LoRA: the same two lines, and an adapter comes out.

python examples/trl_sft.py
"""

from datasets import Dataset
from peft import LoraConfig
from text import pretrained_model, texts, tokenizer
from transformers import set_seed
from trl import SFTConfig, SFTTrainer
from twa.integrations.transformers import RecorderCallback, train_average

set_seed(0)
arguments = SFTConfig(
    "sft-out",
    max_steps=40,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    per_device_train_batch_size=8,
    per_device_eval_batch_size=12,
    eval_strategy="steps",
    eval_steps=20,
    save_strategy="no",
    max_length=64,
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)
trainer = SFTTrainer(
    pretrained_model(),
    arguments,
    train_dataset=Dataset.from_list(texts(0, 500)),
    eval_dataset=Dataset.from_list(texts(4000, 48)),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
callback = RecorderCallback(trainer, every=4, evaluate="lawa", last=8)
trainer.add_callback(callback)
trainer.train()

outcome = train_average(trainer, callback.recorder, steps=20)
print(outcome)
trainer.save_model("sft-out/averaged")  # PeftModel.from_pretrained loads it
