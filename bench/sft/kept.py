"""What an interrupted run keeps: the losses of the steps that every run has finished."""

import json


class Kept:
    """Listens to the first rank's messages, and writes the losses if the run does not end."""

    def __init__(self, settings, data):
        self.settings, self.data = settings, data
        self.losses = {name: [] for name in settings.losses}

    def add(self, message):
        for name, loss in message.get("losses", {}).items():
            self.losses[name].append(loss)

    def write(self, path):
        """A record with "finished": false, of the keys that do not need the ranks' results."""
        record = {
            "finished": False,
            "settings": vars(self.settings),
            "data": self.data,
            "losses": self.losses,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
