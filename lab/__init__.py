"""What the verbs share once runs exist: reading run folders, keeping records, judging. The lab never trains."""
