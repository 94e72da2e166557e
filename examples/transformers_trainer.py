"""transformers' Trainer: a recorded run, its average evaluated on the way, then a trained average.

python examples/transformers_trainer.py
"""

from text import pretrained_model, tokens
from transformers import Trainer, TrainingArguments, set_seed
from twa.integrations.transformers import RecorderCallback, train_average

set_seed(0)
arguments = TrainingArguments(
    "trainer-out",
    max_steps=120,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    per_device_train_batch_size=8,
    per_device_eval_batch_size=20,
    eval_strategy="steps",
    eval_steps=30,
    save_strategy="steps",
    save_steps=30,
    save_total_limit=1,  # the recording needs no checkpoints
    metric_for_best_model="eval_avg_loss",
    load_best_model_at_end=True,  # the best average, then
    report_to=[],
    use_cpu=True,
)
trainer = Trainer(
    pretrained_model(), arguments, train_dataset=tokens(0, 1000), eval_dataset=tokens(1000, 80)
)
callback = RecorderCallback(trainer, every=8, evaluate="ema", half_life=12)
trainer.add_callback(callback)
trainer.train()

outcome = train_average(trainer, callback.recorder, steps=30)
print(outcome)
outcome.save("trainer-out/averaged")
print(trainer.evaluate())  # of the winner
