"""Small archives as the registries' clients download them, and a small manual."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

Files = Mapping[str, bytes]


def wheel(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def npm(path: Path, files: Files) -> Path:
    path.write_bytes(_tar("gz", {f"package/{name}": data for name, data in files.items()}))
    return path


def debian(path: Path, files: Files) -> Path:
    """An `ar` of three members, two of them archives themselves."""
    data = _tar("xz", {f"./{name}": content for name, content in files.items()})
    # One member of odd length: members begin at even places.
    members = {"debian-binary": b"2.0\n\n", "control.tar.xz": _tar("xz", {}), "data.tar.xz": data}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def _tar(compression: str, files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:  # pyright: ignore
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def manual(pages: Sequence[Sequence[str]], outline: Sequence[tuple[str, int]]) -> bytes:
    """A PDF of lines of text.

    Args:
      outline: (title, page) of what stands below the one entry at the top, "Chapter".
    """
    objects: list[str] = []

    def add(text: str) -> int:
        objects.append(text)
        return len(objects)

    first = 4 + 2 * len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    add(f"<< /Type /Catalog /Pages 2 0 R /Outlines {first} 0 R >>")
    add(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    add("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for lines in pages:
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 10 Tf 40 700 Td {shown} ET"
        add(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R "
            f">> >> /Contents {len(objects) + 2} 0 R >>"
        )
        add(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    top, topics = first + 1, first + 2
    last = topics + len(outline) - 1
    add(f"<< /Type /Outlines /First {top} 0 R /Last {top} 0 R /Count 1 >>")
    add(
        f"<< /Title (Chapter) /Parent {first} 0 R /First {topics} 0 R /Last {last} 0 R "
        f"/Count {len(outline)} /Dest [4 0 R /Fit] >>"
    )
    for place, (title, page) in enumerate(outline):
        number = topics + place
        before = f"/Prev {number - 1} 0 R " if place else ""
        after = f"/Next {number + 1} 0 R " if number < last else ""
        add(
            f"<< /Title ({title}) /Parent {top} 0 R {before}{after}"
            f"/Dest [{4 + 2 * page} 0 R /Fit] >>"
        )
    out, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
        f"<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    )
    return out + end.encode()
