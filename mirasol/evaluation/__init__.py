"""What an evaluation is made of: answers, measures, files of predictions, the report, the door to lmms-eval."""
