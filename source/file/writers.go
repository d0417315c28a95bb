package file

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// writerPatience is how long a file that some program keeps open for writing is
// left alone. A redirected command empties its file when it starts, and may
// take seconds before it writes the first word.
const writerPatience = 10 * time.Second

// waitsForWriter says whether a program is writing to a file, and has been for
// no longer than a writer is waited for.
func (s *Source) waitsForWriter(name string, f *os.File) bool {
	if !beingWritten(f) {
		delete(s.busy, name)
		return false
	}
	since, busy := s.busy[name]
	if !busy {
		since = time.Now()
		s.busy[name] = since
	}
	return time.Since(since) < writerPatience
}

// beingWritten says whether a program has the file open for writing. The kernel
// grants a read lease, which is given back at once, only while none has. On
// file systems without leases, and on files of other users where CAP_LEASE is
// missing, nothing is known and the answer is no.
func beingWritten(f *os.File) bool {
	conn, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var refused error
	err = conn.Control(func(fd uintptr) {
		if _, refused = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_RDLCK); refused == nil {
			_, _ = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK)
		}
	})
	return err == nil && errors.Is(refused, unix.EAGAIN)
}
