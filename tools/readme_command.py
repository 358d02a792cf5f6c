"Print one of the two commands of README.md: `python tools/readme_command.py run|test`"
import re, sys
from pathlib import Path

def readme_command(text, name):
    "The bash block right after the comment `<!-- command: name -->` in `text`, or `ValueError`."
    found = re.findall(rf'^<!-- command: {re.escape(name)} -->\s*\n```bash\n(.*?)^```\s*$', text, re.M|re.S)
    if len(found) != 1 or not found[0].strip():
        raise ValueError(f'README.md has {len(found)} bash blocks after <!-- command: {name} -->, one is needed')
    return found[0]

if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in ('run', 'test'): sys.exit(__doc__)
    try:
        print(
            readme_command(
                (Path(__file__).resolve().parent.parent / 'README.md').read_text(encoding='utf-8'), sys.argv[1]
            ),
            end='',
        )
    except (OSError, ValueError) as e:
        sys.exit(f'tools/readme_command.py: {e}')
