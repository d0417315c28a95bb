// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// tree is the content of an initramfs: clean absolute path -> what is there.
type tree map[string]node

// node is one file. Exactly one of source, data and link is set, except for
// directories and devices.
type node struct {
	mode         uint32 // file type and permissions, as in struct stat
	source       string // path on this machine that the content is copied from
	data         []byte
	link         string // target of a symbolic link
	major, minor uint32 // of a device
}

// File types of node.mode, as in struct stat.
const (
	typeDir    = 0o040000
	typeDevice = 0o020000 // a character device
	typeFile   = 0o100000
	typeLink   = 0o120000
)

func (t tree) dir(name string) {
	if name = path.Clean(name); name == "/" {
		return
	}
	if _, ok := t[name]; ok {
		return // perhaps as a link to a directory
	}
	t.dir(path.Dir(name))
	t[name] = node{mode: typeDir | 0o755}
}

// file adds an executable file with the content of source.
func (t tree) file(name, source string) {
	t.dir(path.Dir(name))
	t[path.Clean(name)] = node{mode: typeFile | 0o755, source: source}
}

func (t tree) text(name string, data []byte) {
	t.dir(path.Dir(name))
	t[path.Clean(name)] = node{mode: typeFile | 0o644, data: data}
}

func (t tree) device(name string, major, minor uint32) {
	t.dir(path.Dir(name))
	t[path.Clean(name)] = node{mode: typeDevice | 0o600, major: major, minor: minor}
}

// same adds a file of this machine under the path that it has here, together
// with every symbolic link on the way to it: programs look at the name by which
// they were called.
func (t tree) same(name string) error {
	parts := strings.Split(strings.TrimPrefix(filepath.Clean(name), "/"), "/")
	at := "/"
	for i, part := range parts {
		at = filepath.Join(at, part)
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		switch info.Mode().Type() {
		case fs.ModeDir:
			t.dir(at)
		case fs.ModeSymlink:
			target, err := os.Readlink(at)
			if err != nil {
				return err
			}
			t[at] = node{mode: typeLink | 0o777, link: target}
			if !filepath.IsAbs(target) {
				target = filepath.Join(filepath.Dir(at), target)
			}
			return t.same(filepath.Join(append([]string{target}, parts[i+1:]...)...))
		default:
			t.file(at, at)
		}
	}
	return nil
}

// write writes the tree as a cpio archive of the kind that the kernel reads
// ("newc", see the kernel's buffer-format document).
func (t tree) write(w io.Writer) error {
	names := make([]string, 0, len(t))
	for name := range t {
		names = append(names, name)
	}
	slices.Sort(names) // a directory comes before what is in it
	for i, name := range names {
		if err := t[name].write(w, i+1, name[1:]); err != nil {
			return fmt.Errorf("initramfs: %s: %w", name, err)
		}
	}
	return writeEntry(w, cpioHeader{links: 1}, "TRAILER!!!", nil)
}

func (n node) write(w io.Writer, inode int, name string) error {
	data := n.data
	switch {
	case n.source != "":
		var err error
		if data, err = os.ReadFile(n.source); err != nil {
			return err
		}
	case n.link != "":
		data = []byte(n.link)
	}
	h := cpioHeader{inode: inode, mode: n.mode, links: 1, major: n.major, minor: n.minor}
	return writeEntry(w, h, name, data)
}

type cpioHeader struct {
	inode        int
	mode         uint32
	links        int
	major, minor uint32
}

// writeEntry writes a header, a name and a content, the latter two filled up to
// multiples of four bytes counted from the start of the header.
func writeEntry(w io.Writer, h cpioHeader, name string, data []byte) error {
	const headerSize = 6 + 13*8
	fields := []uint32{
		uint32(h.inode), h.mode, 0, 0, uint32(h.links), 0, // inode, mode, user, group, links, time
		uint32(len(data)), 0, 0, h.major, h.minor, uint32(len(name) + 1), 0, // size, on device, is device, name, checksum
	}
	var b strings.Builder
	b.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&b, "%08X", f)
	}
	b.WriteString(name)
	b.WriteString(strings.Repeat("\x00", 1+padding(headerSize+len(name)+1)))
	if _, err := io.WriteString(w, b.String()); err != nil {
		return err
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, padding(len(data))))
	return err
}

func padding(n int) int { return (4 - n%4) % 4 }
