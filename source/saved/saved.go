// SPDX-License-Identifier: Apache-2.0

// Package saved keeps objects in a file, for a start without an API server.
//
// A file is a journal: each record is an object in its latest form, or says that an object
// is gone. The last record of a name counts. Records have checksums. After a crash, the
// records before the first incomplete one count.
//
// A process writes a new file, and renames it into place when it has all objects. So two
// processes never write to the same file.
package saved

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/rootonly"
)

// magic begins each file. Another version of the format gets another one.
const magic = "signalbox saved state 1\n"

const (
	// MaxSize is the limit of a new file, in bytes. 50,000 Services with 10 endpoints each need 90 MiB.
	MaxSize = 512 << 20
	// maxRecord is more than etcd stores for an object.
	maxRecord = 8 << 20
	// wasteFrom keeps small files from being written anew all the time.
	wasteFrom = 1000
)

var (
	// ErrFull is for an object that would make a file larger than its limit.
	ErrFull = errors.New("the file would exceed its limit")

	errTooLarge = fmt.Errorf("the object has more than %d MiB", maxRecord>>20)
	errFormat   = errors.New("not a saved state of this version")
	errDamaged  = errors.New("a record is damaged")
)

var checksums = crc32.MakeTable(crc32.Castagnoli)

// File is a journal that is being written. One goroutine at a time uses it.
type File struct {
	Limit int64 // of the size; a file that Compact returns has the same

	path    string // where Commit puts it
	name    string // where it is
	file    *os.File
	size    int64 // to the end of the last record
	records int   // with those that are out of date
	torn    bool  // after size, there may be a part of what could not be written
}

// Create creates a file that takes the path when Commit is called. It creates the
// directory, too. Only this process's user can read either.
func Create(path string) (*File, error) {
	dir := filepath.Dir(path)
	if err := rootonly.MakeDir(dir); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(dir, filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	f := &File{Limit: MaxSize, path: path, name: file.Name(), file: file, size: int64(len(magic))}
	if _, err := file.WriteString(magic); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// What a record says of its object.
const (
	gone    = 0
	present = 1
)

// A record is its length and checksum, each of four bytes, and its body: what it says, the
// length of the name in two bytes, the name, the text.
const (
	headerSize = 8
	nameBegin  = 3 // in the body
)

// Append writes the latest forms of objects, by name; nil is for an object that is gone.
// After an error, the file has none of them, and can be written again.
func (f *File) Append(objects iter.Seq2[string, []byte]) error {
	if f.torn {
		if err := f.file.Truncate(f.size); err != nil {
			return err
		}
	}
	f.torn = true
	buf := bufio.NewWriterSize(io.NewOffsetWriter(f.file, f.size), 64<<10)
	size, records := f.size, f.records
	var record []byte
	for name, text := range objects {
		length := int64(nameBegin + len(name) + len(text))
		switch {
		case length > maxRecord:
			return fmt.Errorf("%s: %w", name, errTooLarge)
		case size+headerSize+length > f.Limit:
			return fmt.Errorf("%w of %d MiB", ErrFull, f.Limit>>20)
		}
		record = appendRecord(record[:0], name, text)
		if _, err := buf.Write(record); err != nil {
			return err
		}
		size += int64(len(record))
		records++
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	f.size, f.records, f.torn = size, records, false
	return nil
}

func appendRecord(record []byte, name string, text []byte) []byte {
	kind := byte(present)
	if text == nil {
		kind = gone
	}
	record = append(record, make([]byte, headerSize)...)
	record = append(record, kind)
	record = binary.LittleEndian.AppendUint16(record, uint16(len(name)))
	record = append(append(record, name...), text...)
	body := record[headerSize:]
	binary.LittleEndian.PutUint32(record, uint32(len(body)))
	binary.LittleEndian.PutUint32(record[4:], crc32.Checksum(body, checksums))
	return record
}

// Commit puts the file in place, and removes the files of processes that ended before they
// could put theirs in place. If another process still writes one of these, its file is Lost.
func (f *File) Commit() error {
	if err := f.file.Sync(); err != nil { // before the name: a crash must not leave an empty file
		return err
	}
	if err := os.Rename(f.name, f.path); err != nil {
		return err
	}
	f.name = f.path
	others, _ := filepath.Glob(f.path + ".*") // the pattern is well-formed
	for _, other := range others {
		_ = os.Remove(other) // at worst it stays
	}
	return nil
}

// InPlace says whether Commit has put the file in place.
func (f *File) InPlace() bool { return f.name == f.path }

// Lost says whether the file has lost its name, because another process has put its own
// file in place. Records are then of no use until Compact has made a new file of them.
func (f *File) Lost() bool {
	own, err := f.file.Stat()
	there, thereErr := os.Stat(f.name)
	return err != nil || thereErr != nil || !os.SameFile(own, there)
}

// Wasteful says whether most records are out of date, if that many objects exist.
func (f *File) Wasteful(objects int) bool { return f.records > 2*objects+wasteFrom }

// Compact returns a new file with the latest records alone, and with changes, for Commit to
// put in place. The old one is then closed.
func (f *File) Compact(changes iter.Seq2[string, []byte]) (*File, error) {
	latest := map[string]int64{} // where the last record of each object is
	err := f.scan(func(at int64, name string, text []byte) bool {
		latest[name] = at
		if text == nil {
			delete(latest, name)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for name := range changes {
		delete(latest, name)
	}
	next, err := Create(f.path)
	if err != nil {
		return nil, err
	}
	next.Limit = f.Limit
	var read error
	err = next.Append(func(yield func(string, []byte) bool) {
		more := true
		read = f.scan(func(at int64, name string, text []byte) bool {
			more = latest[name] != at || yield(name, text)
			return more
		})
		if !more || read != nil {
			return
		}
		for name, text := range changes {
			if text != nil && !yield(name, text) {
				return
			}
		}
	})
	if err := errors.Join(err, read); err != nil {
		return nil, errors.Join(err, next.Close())
	}
	_ = f.Close() // nothing is lost: next has all records
	return next, nil
}

// scan calls found for each record, with where it begins, until found returns false.
func (f *File) scan(found func(at int64, name string, text []byte) bool) error {
	at := int64(len(magic))
	r := bufio.NewReaderSize(io.NewSectionReader(f.file, at, f.size-at), 256<<10)
	for at < f.size {
		name, text, err := readRecord(r)
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if !found(at, name, text) {
			return nil
		}
		at += int64(headerSize + nameBegin + len(name) + len(text))
	}
	return nil
}

// Close closes the file. A file that is not in place is removed.
func (f *File) Close() error {
	err := f.file.Close()
	if !f.InPlace() {
		if removed := os.Remove(f.name); !errors.Is(removed, fs.ErrNotExist) {
			err = errors.Join(err, removed)
		}
	}
	return err
}

// Load returns the latest form of each object in the file at a path, by name, and when the
// file was last written.
func Load(path string) (objects map[string][]byte, written time.Time, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, written, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, written, err
	}
	r := bufio.NewReaderSize(file, 256<<10)
	begin := make([]byte, len(magic))
	if _, err := io.ReadFull(r, begin); err != nil || string(begin) != magic {
		return nil, written, fmt.Errorf("%s: %w", path, errFormat)
	}
	objects = map[string][]byte{}
	for {
		name, text, err := readRecord(r)
		if err != nil {
			return objects, info.ModTime(), nil // the end, or a record that was not written completely
		}
		if text == nil {
			delete(objects, name)
		} else {
			objects[name] = text
		}
	}
}

// readRecord returns a record; text is nil for an object that is gone.
func readRecord(r io.Reader) (name string, text []byte, err error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return "", nil, err
	}
	length := binary.LittleEndian.Uint32(header[:])
	if length < nameBegin || length > maxRecord {
		return "", nil, errDamaged
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return "", nil, err
	}
	nameEnd := nameBegin + int(binary.LittleEndian.Uint16(body[1:]))
	if crc32.Checksum(body, checksums) != binary.LittleEndian.Uint32(header[4:]) || nameEnd > len(body) {
		return "", nil, errDamaged
	}
	if body[0] == present {
		text = body[nameEnd:]
	}
	return string(body[nameBegin:nameEnd]), text, nil
}
