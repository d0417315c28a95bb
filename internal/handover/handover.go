// Package handover keeps sockets open across a restart: a service manager that
// speaks systemd's protocols holds them while no process runs, and gives them to
// the next one. See sd_listen_fds(3) and sd_notify(3).
package handover

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Sockets are those that an earlier process left with the service manager, and
// the way to leave more. A nil *Sockets has none and keeps none.
type Sockets struct {
	notify string // the service manager's socket, or ""

	mu   sync.Mutex
	left map[string][]*os.File // by name
}

// FromEnvironment takes what the service manager passed to this process
// ($LISTEN_FDS, $NOTIFY_SOCKET). $LISTEN_FDS is gone afterwards: programs that this process
// starts get none of it.
func FromEnvironment() *Sockets {
	s := &Sockets{notify: os.Getenv(notifySocket), left: map[string][]*os.File{}}
	for _, f := range activation.Files(true) {
		s.left[f.Name()] = append(s.left[f.Name()], f)
	}
	return s
}

const notifySocket = "NOTIFY_SOCKET"

// Has says whether a socket of that name is there to be taken.
func (s *Sockets) Has(name string) bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.left[name]) > 0
}

// Take returns the socket of that name, which is the caller's then, or nil.
func (s *Sockets) Take(name string) *os.File {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	files := s.left[name]
	if len(files) == 0 {
		return nil
	}
	s.left[name] = files[1:]
	return files[0]
}

// Kept says whether there is a service manager that Keep leaves sockets with.
func (s *Sockets) Kept() bool { return s != nil && s.notify != "" }

// Keep leaves a copy of a socket with the service manager under a name without
// colons. Without a manager it does nothing. That the manager takes it cannot be
// known: systemd does for services with FileDescriptorStoreMax=.
func (s *Sockets) Keep(name string, socket syscall.Conn) error {
	if !s.Kept() {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("socket %s for the service manager: %w", name, err)
	}
	// Not by File, whose Fd would make the socket a blocking one for everybody
	// who has it. Without FDPOLL=0 systemd lets go of a socket that reports an
	// error.
	var told error
	err = raw.Control(func(fd uintptr) { told = s.tell("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, int(fd)) })
	return errors.Join(err, told)
}

// Forget has the service manager close what it keeps under a name.
func (s *Sockets) Forget(name string) error {
	if !s.Kept() {
		return nil
	}
	return s.tell("FDSTOREREMOVE=1\nFDNAME=" + name)
}

// CloseRest closes what nobody has taken and has the service manager forget it:
// it is of another configuration.
func (s *Sockets) CloseRest() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var failed []error
	for name, files := range s.left {
		for _, f := range files {
			failed = append(failed, f.Close())
		}
		if len(files) > 0 {
			failed = append(failed, s.Forget(name))
		}
	}
	s.left = map[string][]*os.File{}
	return errors.Join(failed...)
}

// tell sends the service manager a message with copies of files.
func (s *Sockets) tell(state string, files ...int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		// A leading @ stands for an abstract address here as there.
		err = unix.Sendmsg(fd, []byte(state), unix.UnixRights(files...), &unix.SockaddrUnix{Name: s.notify}, 0)
	}
	if err != nil {
		return fmt.Errorf("tell the service manager at %s %q: %w", s.notify, strings.Split(state, "\n")[0], err)
	}
	return nil
}

// Ready tells the service manager, if there is one, that this process serves.
func Ready() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	return err
}

// Stopping tells it that this process is about to end.
func Stopping() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
	return err
}
