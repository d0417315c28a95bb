// SPDX-License-Identifier: Apache-2.0

// Package saved keeps objects in a file, for a start without an API server.
//
// A file is a journal: each record is an object in its latest form, or says that an object
// is gone. The last record of a name counts. Records have checksums. After a crash, the
// records before the first incomplete one count.
//
// A process writes a new file, and renames it into place when it has all objects. So an
// earlier process that still runs does not write to the same file.
package saved

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/rootonly"
)

// magic begins each file. Another version of the format gets another one.
const magic = "signalbox saved state 1\n"

const (
	// MaxSize bounds a file. 50,000 Services with 10 endpoints each need 90 MiB.
	MaxSize = 512 << 20
	// maxRecord is more than etcd stores for an object.
	maxRecord = 8 << 20
	// wasteFrom keeps small files from being written anew all the time.
	wasteFrom = 1000
)

var (
	// ErrFull is for an object that would make a file larger than MaxSize.
	ErrFull = fmt.Errorf("the file would exceed %d MiB", MaxSize>>20)
	// ErrReplaced means that another process has put its file in place.
	ErrReplaced = errors.New("another process saves the state now")

	errFormat  = errors.New("not a saved state of this version")
	errDamaged = errors.New("a record is damaged")
)

var checksums = crc32.MakeTable(crc32.Castagnoli)

// Place is where a record is in a file.
type Place int64

// File is a journal that is being written. One goroutine at a time uses it.
type File struct {
	path    string
	file    *os.File
	size    int64         // with what is buffered
	records int           // with those that are out of date
	inPlace bool          // the file is at its path
	buf     *bufio.Writer // what Flush writes
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
	f := &File{path: path, file: file, size: int64(len(magic)), buf: bufio.NewWriterSize(file, 64<<10)}
	_, err = f.buf.WriteString(magic)
	return f, err
}

// Put appends the latest form of an object.
func (f *File) Put(name string, text []byte) (Place, error) { return f.append(present, name, text) }

// Delete appends that an object is gone.
func (f *File) Delete(name string) error {
	_, err := f.append(gone, name, nil)
	return err
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

func (f *File) append(kind byte, name string, text []byte) (Place, error) {
	length := nameBegin + len(name) + len(text)
	if length > maxRecord || f.size+headerSize+int64(length) > MaxSize {
		return 0, ErrFull
	}
	record := make([]byte, headerSize, headerSize+length)
	record = append(record, kind)
	record = binary.LittleEndian.AppendUint16(record, uint16(len(name)))
	record = append(append(record, name...), text...)
	binary.LittleEndian.PutUint32(record, uint32(length))
	binary.LittleEndian.PutUint32(record[4:], crc32.Checksum(record[headerSize:], checksums))
	at := Place(f.size)
	f.size += int64(len(record))
	f.records++
	_, err := f.buf.Write(record)
	return at, err
}

// Flush writes what is buffered.
func (f *File) Flush() error { return f.buf.Flush() }

// Commit puts the file in place.
func (f *File) Commit() error {
	err := f.Flush()
	if err == nil {
		err = f.file.Sync() // before the name: a crash must not leave an empty file
	}
	if err == nil {
		err = os.Rename(f.file.Name(), f.path)
	}
	f.inPlace = err == nil
	return err
}

// InPlace says whether Commit has put the file in place.
func (f *File) InPlace() bool { return f.inPlace }

// Wasteful says whether most records are out of date, if that many objects exist.
func (f *File) Wasteful(objects int) bool { return f.records > 2*objects+wasteFrom }

// Rewrite puts a file with the latest records alone in place, and returns it. The old one
// is then closed. copyAll calls keep for each record, and gets its new place.
func (f *File) Rewrite(copyAll func(keep func(name string, at Place) (Place, error)) error) (*File, error) {
	if err := f.stillInPlace(); err != nil {
		return nil, err
	}
	if err := f.Flush(); err != nil {
		return nil, err
	}
	next, err := Create(f.path)
	if err != nil {
		return nil, err
	}
	err = copyAll(func(name string, at Place) (Place, error) {
		_, text, err := readRecord(io.NewSectionReader(f.file, int64(at), headerSize+maxRecord))
		if err != nil {
			return 0, err
		}
		return next.Put(name, text)
	})
	if err == nil {
		err = next.Commit()
	}
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	return next, f.file.Close()
}

func (f *File) stillInPlace() error {
	own, err := f.file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Stat(f.path)
	if err != nil || !os.SameFile(own, there) {
		return errors.Join(ErrReplaced, err)
	}
	return nil
}

// Close writes what is buffered and closes the file. A file that was never put in place is
// removed.
func (f *File) Close() error {
	err := errors.Join(f.Flush(), f.file.Close())
	if !f.inPlace {
		err = errors.Join(err, os.Remove(f.file.Name()))
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

// Leftovers removes the files of processes that ended before they could put them in place.
func (f *File) Leftovers() {
	others, _ := filepath.Glob(f.path + ".*") // the pattern is well-formed
	for _, other := range others {
		_ = os.Remove(other) // at worst it stays
	}
}
