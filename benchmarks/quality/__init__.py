"""What each mechanism learns, on tasks that are made here: the tasks, one classifier, one trainer, one protocol."""
