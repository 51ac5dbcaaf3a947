"""Copies chosen files out of every wheel of a folder: FOLDER TARGET (FROM TO)..."""

import os
import shutil
import sys
import zipfile

folder, target, *pairs = sys.argv[1:]
keep = dict(zip(pairs[::2], pairs[1::2]))
found = set()
for wheel in sorted(name for name in os.listdir(folder) if name.endswith(".whl")):
    print("Unpacking", wheel, flush=True)
    with zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
        for entry in archive.infolist():
            name = entry.filename
            source = next((k for k in keep if k == name or k.endswith("/") and name.startswith(k)), None)
            if source is None or entry.is_dir():
                continue
            found.add(source)
            path = os.path.join(target, keep[source] + name[len(source):])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # zipfile checks the CRC of what it reads to the end.
            with archive.open(entry) as reader, open(path, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
missing = sorted(set(keep) - found)
if missing:
    sys.exit("not in the wheels: " + ", ".join(missing))
