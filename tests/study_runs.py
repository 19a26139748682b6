# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What tests of studies share: texts, and runs in processes that need not import the libraries."""

import subprocess

from datasets import Dataset, DatasetDict
from preloaded import start_python


TEXTS = {
    name: DatasetDict({split: Dataset.from_list([{"text": words * 300}] * 4) for split in ("train", "validation")})
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}


def run_preloaded(command, env, output, check=True):
    """What `subprocess.run` does, in a process that need not import the libraries."""
    process = start_python(command[1:], env, output)
    process.join()
    if check and process.exitcode:
        raise subprocess.CalledProcessError(process.exitcode, command, output.read_text())
    return subprocess.CompletedProcess(command, process.exitcode)
