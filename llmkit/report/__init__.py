"""What happened, told while it happens (`console`) and afterwards (`report`, `card`). No torch here.

`console.make_reporter` gives the one Reporter of a command; `run_log.RunLog` writes the run's records;
`report.write_report` turns a run folder into `report.json` and `report.html`; `card.write_model_card` writes
the exported model's README.
"""
