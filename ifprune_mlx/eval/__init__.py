"""Quality: losses under selections beside their controls, tasks, verdicts, charts."""
