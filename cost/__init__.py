"""What a run will cost: `./run.sh plan` with the trainer's flags.

predict      flags -> memory, traffic, time and dollars of a run
step         one training step of one rank, traced on tensors without memory
operations   how such a step is recorded
time         seconds of a recorded step on a card; seconds of real steps on this CPU
"""
