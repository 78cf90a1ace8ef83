"""What a run stands on: SPECs, schedules, checkpoints, the run folder, ranks, hardware."""
